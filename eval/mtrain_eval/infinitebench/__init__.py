"""InfiniteBench (Zhang et al. 2024, arXiv 2402.13718): its 12 tasks on its own data, and offline twins of the synthetic ones.

Tasks on the published data (``infinitebench_passkey`` ...) are there when the data is: files in DATA_DIR/infinitebench, or
online. The twins (``infinitebench_twin_passkey`` ...) are always there, and are no InfiniteBench scores.
"""

from __future__ import annotations

from mtrain_eval.infinitebench.data import available
from mtrain_eval.infinitebench.published import PublishedTask
from mtrain_eval.infinitebench.twins import RULES, TwinTask
from mtrain_eval.sample import SuiteOptions, Task


def tasks(options: SuiteOptions) -> list[Task]:
    """The twins, and before them the published tasks whose data is at hand.

    Raises:
        EvalError: a data directory without any file of InfiniteBench, and not online.
    """
    published: list[Task] = [PublishedTask(options, entry) for entry in available(options)]
    return [*published, *(TwinTask(options, split) for split in RULES)]
