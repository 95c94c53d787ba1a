"""mtrain's own retrieval: the exam of the quickstart, and small relatives of RULER's needle tasks over the same symbols.

For models trained on ``kind: retrieval`` data. A tokenizer has the symbols when it is mtrain's byte tokenizer, or has enough
whole lower-case words to stand for them (`mtrain.data.symbols`).
"""

from __future__ import annotations

from mtrain.data.symbols import symbols_of
from mtrain.errors import DataError, EvalError
from mtrain_eval.retrieval.task import ExamTask, RecallTask, Shape
from mtrain_eval.sample import SuiteOptions, Task

# What mtrain.quickstart.measure asks, with its seed 2026.
EXAM = Shape(pairs=32, questions=16)
SHAPES = {
    "retrieval_single": Shape(pairs=4, questions=1),
    "retrieval_multikey": Shape(pairs=64, questions=1),
    "retrieval_multiquery": Shape(pairs=16, questions=16),
    "retrieval_multivalue": Shape(pairs=4, questions=1, values=4),
}


def tasks(options: SuiteOptions) -> list[Task]:
    """The exam and its relatives.

    Raises:
        EvalError: the tokenizer has no symbols for keys and values.
    """
    try:
        symbols_of(options.tokenizer)
    except DataError as error:
        raise EvalError(
            f"suite retrieval: {error}. It is for models trained on `kind: retrieval` data: with mtrain's tokenizer `bytes`, "
            "or one with whole lower-case words (GPT-2's, Qwen's, Llama's); leave `retrieval` out of --suite for this model"
        ) from error
    relatives = [RecallTask(options, name, shape) for name, shape in SHAPES.items()]
    return [ExamTask(options, "retrieval", EXAM), *relatives]
