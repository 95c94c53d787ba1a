"""The 12 tasks of InfiniteBench (Zhang et al. 2024, arXiv 2402.13718, table 2; code https://github.com/OpenBMB/InfiniteBench)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LabelKind = Literal["text", "texts", "option", "integer", "number", "integers"]


@dataclass(frozen=True)
class Entry:
    """One task.

    Attributes:
        split: name of its file (``SPLIT.jsonl``) and of the hub's split.
        title: name in the paper's tables.
        max_new_tokens: generated at most (the benchmark's own numbers).
        metric: key of the score.
        label: type of the right answer in the benchmark's own files, see `labels.restore`.
        template: the task's file in lm-eval, without folder and ending; "": it has none.
    """

    split: str
    title: str
    max_new_tokens: int
    metric: str
    label: LabelKind
    template: str

    @property
    def name(self) -> str:
        """Of the task on the published data."""
        return f"infinitebench_{self.split}"


# lm-eval writes `_en` where the data has `_eng`, and has no math_calc.
ENTRIES = (
    Entry("passkey", "Retrieve.PassKey", 6, "accuracy", "text", "passkey"),
    Entry("number_string", "Retrieve.Number", 12, "accuracy", "text", "number_string"),
    Entry("kv_retrieval", "Retrieve.KV", 50, "accuracy", "text", "kv_retrieval"),
    Entry("longbook_sum_eng", "En.Sum", 1200, "rougeLsum", "texts", "longbook_sum_en"),
    Entry("longbook_qa_eng", "En.QA", 40, "f1", "texts", "longbook_qa_en"),
    Entry("longbook_choice_eng", "En.MC", 40, "accuracy", "option", "longbook_choice_en"),
    Entry("longdialogue_qa_eng", "En.Dia", 40, "accuracy", "texts", "longdialogue_qa_en"),
    Entry("longbook_qa_chn", "Zh.QA", 40, "f1", "texts", "longbook_qa_chn"),
    Entry("code_debug", "Code.Debug", 5, "accuracy", "option", "code_debug"),
    Entry("code_run", "Code.Run", 5, "accuracy", "integer", "code_run"),
    Entry("math_calc", "Math.Calc", 30000, "prefix", "integers", ""),
    Entry("math_find", "Math.Find", 3, "accuracy", "number", "math_find"),
)
BY_SPLIT = {entry.split: entry for entry in ENTRIES}
