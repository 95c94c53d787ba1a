"""RULER's variable tracking (scripts/data/synthetic/variable_tracking.py): one chain of assignments among noise, one-shot."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from mtrain_eval.ruler.niah import noise_line
from mtrain_eval.ruler.sizing import largest_fit
from mtrain_eval.ruler.task import Draft, Plan, RulerTask
from mtrain_eval.sample import SuiteOptions
from mtrain_eval.tokens import count_tokens
from mtrain_eval.upstream import constant

HOPS = 4  # so there are HOPS + 1 variables
EXAMPLE_TOKENS = 500
_TRIES = 200


@dataclass(frozen=True)
class Chain:
    """Variables that hold the same value, and the lines that say so, in their order."""

    names: tuple[str, ...]
    value: str

    @property
    def lines(self) -> list[str]:
        first = f"VAR {self.names[0]} = {self.value}"
        return [first, *(f"VAR {new} = VAR {old} " for old, new in zip(self.names, self.names[1:], strict=False))]


def draw_chain(rng: random.Random, letters: int, other: str = "") -> Chain:
    """A chain of different names of so many capital letters; the value is 10000 to 99998, but not the other chain's."""
    names: dict[str, None] = {}
    for _ in range(_TRIES):
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name != "VAR":
            names[name] = None
        if len(names) == HOPS + 1:
            break
    value = next(v for v in (str(v) for v in rng.sample(range(10000, 99999), 2)) if v != other)
    return Chain(tuple(names), value)


def templates() -> tuple[str, str]:
    """(prompt, beginning of the answer), with the spelling that NVIDIA has mended since lm-eval took them over."""
    config = constant("ruler/vt_utils.py", "CONFIG")["variable_tracking"]
    return str(config["template"]), str(config["answer_prefix"]).replace("assgined", "assigned")


class VariableTracking(RulerTask):
    """Which variables hold the value? All five of the chain."""

    def __init__(self, options: SuiteOptions) -> None:
        super().__init__(options, "vt", max_new_tokens=30)

    def plan(self, length: int, index: int, attempt: int) -> Plan:
        """An example of at most 500 tokens, or the shortest there is where the length or the tokenizer leaves no room."""
        chain = draw_chain(self.rng(length, index, attempt, "chain"), letters=5)
        shot = draw_chain(self.rng(length, index, attempt, "example"), letters=3, other=chain.value)
        prompt, prefix = templates()
        values = {"query": chain.value, "num_v": HOPS + 1}

        def shown(lines: int) -> str:
            places = self.rng(length, index, attempt, "example places")
            example = (prompt + prefix).format(
                context=_among_noise(shot, lines, places), query=shot.value, num_v=HOPS + 1
            )
            return f"{example} {' '.join(shot.names)}\n\n"

        def built(example: str, units: int) -> Draft:
            context = _among_noise(chain, units, self.rng(length, index, attempt, "places"))
            return Draft(
                example + prompt.format(context=context, **values),
                prefix.format(**values),
                chain.names,
                meta={"query": chain.value},
            )

        def tokens(lines: int) -> int:
            return count_tokens(self.options.tokenizer, shown(lines))

        smallest = HOPS + 1  # each line of the chain before another line of noise
        example = shown(smallest)
        if tokens(smallest) <= EXAMPLE_TOKENS:
            longer = shown(largest_fit(tokens, EXAMPLE_TOKENS, smallest))
            if len(self._encode(built(longer, smallest))) + self.max_new_tokens <= length:
                example = longer
        return Plan(lambda units: built(example, units), smallest)


def _among_noise(chain: Chain, lines: int, rng: random.Random) -> str:
    text = [noise_line()] * lines
    for done, (place, line) in enumerate(zip(sorted(rng.sample(range(lines), HOPS + 1)), chain.lines, strict=True)):
        text.insert(place + done, line)
    return "\n".join(text)
