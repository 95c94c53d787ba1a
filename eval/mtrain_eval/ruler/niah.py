"""RULER's eight needle tasks (Hsieh et al. 2024, section 3; scripts/data/synthetic/niah.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mtrain_eval.prose import missing_essays
from mtrain_eval.ruler.haystack import Essays
from mtrain_eval.ruler.task import Draft, Plan, RulerTask
from mtrain_eval.ruler.words import Draws
from mtrain_eval.sample import SuiteOptions
from mtrain_eval.upstream import constant

# Per cent of the text at which needles may lie among essays.
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40)).astype(int)]
_QUESTION = re.compile(r"What (is|are) (?:all )?t(he [^?\n]*)\?$")  # in one line: a haystack may end amid a question


@dataclass(frozen=True)
class Kind:
    """What a needle task is made of.

    Attributes:
        haystack: ``noise`` (a line of five sentences, repeated), ``essay`` or ``needle`` (needles of other keys).
        key, value: ``words``, ``numbers`` or ``uuids``.
        keys: different keys in the text; at least ``queries``.
        values: of each key.
        queries: keys asked for.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", value="uuids"),
    "niah_multikey_1": Kind("essay", keys=4),
    "niah_multikey_2": Kind("needle"),
    "niah_multikey_3": Kind("needle", key="uuids", value="uuids"),
    "niah_multivalue": Kind("essay", values=4),
    "niah_multiquery": Kind("essay", keys=4, queries=4),
}


def noise_line() -> str:
    """The line that fills a text without saying anything."""
    return str(constant("ruler/vt_utils.py", "noise", within="generate_input_output")).strip()


def template(one: bool) -> str:
    """The prompt with ``{type_needle_v}``, ``{context}`` and ``{query}``; for one answer in the singular, as RULER does it."""
    text = str(constant("ruler/niah_utils.py", "TEMPLATE"))
    if one:
        for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
            text = text.replace(plural, singular)
    return text


def answer_prefix(prompt: str) -> str:
    """The question that ends a prompt, turned into the beginning of its answer."""
    question = _QUESTION.search(prompt)
    assert question is not None, prompt[-200:]
    return f" T{question[2]} {question[1]}"


class NeedleTask(RulerTask):
    """Needles "one of the special magic numbers for KEY is: VALUE." in a haystack; the values of some keys are asked for."""

    def __init__(self, options: SuiteOptions, name: str, essays: Essays) -> None:
        super().__init__(options, name, max_new_tokens=128)
        self.kind = KINDS[name]
        self.essays = essays

    @property
    def source(self) -> str:  # type: ignore[override]
        """``generated``, unless essays are the haystack: then theirs."""
        return self.essays.source if self.kind.haystack == "essay" else "generated"

    def missing(self) -> str | None:
        """See RulerTask: the essays."""
        return missing_essays(self.options) if self.kind.haystack == "essay" else None

    def plan(self, length: int, index: int, attempt: int) -> Plan:
        """Keys, values, their order and their depths are drawn once; the haystack around them has any size."""
        kind, needle = self.kind, str(constant("ruler/prepare_niah.py", "NEEDLE"))
        draws = Draws(self.rng(length, index, attempt, "needles"))
        values = {draws.one(kind.key): [draws.one(kind.value) for _ in range(kind.values)] for _ in range(kind.keys)}
        needles = [
            needle.format(type_needle_v=kind.value, key=key, value=value) for key in values for value in values[key]
        ]
        order = self.rng(length, index, attempt, "order")
        asked = order.sample(list(values), kind.queries)
        targets = tuple(value for key in asked for value in values[key])
        wanted = [text for text in needles if any(text.endswith(f" {value}.") for value in targets)]
        order.shuffle(needles)
        depths = sorted(order.sample(DEPTHS, len(needles)))
        others: list[str] = []

        def build(units: int) -> Draft:
            if kind.haystack == "essay":
                context, places = self._among_essays(units, needles, depths)
            else:
                while kind.haystack == "needle" and len(others) < units:
                    others.append(
                        needle.format(type_needle_v=kind.value, key=draws.one(kind.key), value=draws.one(kind.value))
                    )
                lines = others[:units] if kind.haystack == "needle" else [noise_line()] * units
                rng = self.rng(length, index, attempt, "places")
                context, places = _among_lines(lines, needles, sorted(rng.sample(range(units), len(needles))))
            return self._draft(context, asked, targets, wanted[0] if len(wanted) == 1 else None, places)

        if kind.haystack == "essay":
            return Plan(build, smallest=1, cost=self.essays.cost)
        return Plan(build, smallest=len(needles))

    def _draft(
        self, context: str, asked: list[str], targets: tuple[str, ...], needle: str | None, places: list[float]
    ) -> Draft:
        one = len(targets) == 1
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        kind = self.kind.value[:-1] if one else self.kind.value
        prompt = template(one).format(type_needle_v=kind, context=context, query=query)
        return Draft(prompt, answer_prefix(prompt), targets, needle, {"query": query, "depths": places})

    def _among_essays(self, words: int, needles: list[str], depths: list[int]) -> tuple[str, list[float]]:
        """Needles between sentences, each at its share of the sentences: int(sentences * depth / 100)."""
        sentences = self.essays.sentences(words)
        at = [int(sentences * (depth / 100)) for depth in depths]
        cuts = [0, *(words if j == sentences else self.essays.start(j) for j in at), words]
        pieces = []
        for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            pieces += [self.essays.text(start, stop), *needles[i : i + 1]]
        return " ".join(pieces), [round(j / sentences, 4) for j in at]


def _among_lines(lines: list[str], needles: list[str], at: list[int]) -> tuple[str, list[float]]:
    """Needles before different lines, in the order of RULER: the last needle comes first."""
    mixed = list(lines)
    for place, needle in zip(reversed(at), needles, strict=True):
        mixed.insert(place, needle)
    return "\n".join(mixed), [round(place / len(lines), 4) for place in at]
