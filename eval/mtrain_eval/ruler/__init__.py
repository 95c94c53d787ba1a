"""RULER (Hsieh et al. 2024, arXiv 2404.06654): its 13 tasks as published, at any length and for any tokenizer."""

from __future__ import annotations

from mtrain_eval.ruler.aggregation import CommonWords, FrequentWords
from mtrain_eval.ruler.haystack import Essays
from mtrain_eval.ruler.niah import KINDS, NeedleTask
from mtrain_eval.ruler.qa import QuestionAnswering
from mtrain_eval.ruler.task import RulerTask
from mtrain_eval.ruler.vt import VariableTracking
from mtrain_eval.sample import SuiteOptions


def tasks(options: SuiteOptions) -> list[RulerTask]:
    """The tasks, in the order of the paper's tables."""
    essays = Essays(options)
    return [
        *(NeedleTask(options, name, essays) for name in KINDS),
        VariableTracking(options),
        CommonWords(options),
        FrequentWords(options),
        QuestionAnswering(options, "qa_1"),
        QuestionAnswering(options, "qa_2"),
    ]
