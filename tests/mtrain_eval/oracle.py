"""Stand-ins for a model that need no weights: one that finds every answer by rule, and some that only guess.

They get what a model gets, token ids, and nothing of the sample beside: neither targets nor the task's name. The rules read the
prompt's text and know the forms of the questions; a prompt of a form that none knows is an error, so a new task needs a rule.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain_eval.niah.prose_tasks import KamradtTask

MAGIC = re.compile(r"One of the special magic \w+ for (.+?) is: (\S+)\.")  # a word may have a space: "sea level"
ASSIGNED = re.compile(r"VAR (\w+) = (?:VAR )?(\w+)")


# --- rules ---------------------------------------------------------------------------------------------------------------


def magic(text: str) -> str | None:
    """RULER's needles: every value of every key that is asked."""
    question = re.search(
        r"What (?:is|are all) the special magic \w+ for ([^?]*) mentioned in the provided text\?", text
    )
    if question is None:
        return None
    keys = re.split(r", and |, ", question[1])
    found = MAGIC.findall(text)
    return " ".join(value for key in keys for name, value in found if name == key)


def variables(text: str) -> str | None:
    """Variable tracking: who holds the value, through any number of hops."""
    question = re.findall(r"Find all variables that are assigned the value (\d+)", text)
    if not question:
        return None
    held = {question[-1]}
    while new := {name for name, source in ASSIGNED.findall(text) if source in held} - held:
        held |= new
    return " ".join(sorted(held - {question[-1]}))


def common_words(text: str) -> str | None:
    """The ten most common words of the last numbered list."""
    lists = re.findall(r"numbered list of words\..*?\n(1\. .*?)\nQuestion: What are the 10 most common", text, re.S)
    if not lists:
        return None
    words = re.split(r"\s*\b\d+\. ", lists[-1])[1:]
    return " ".join(word for word, _ in Counter(words).most_common(10))


def coded_words(text: str) -> str | None:
    """The three most frequent coded words, dots left out."""
    found = re.search(r"frequently appeared coded words\. (.*)\nQuestion: Do not provide", text, re.S)
    if found is None:
        return None
    counts = Counter(word for word in found[1].split() if word != "...")
    return " ".join(word for word, _ in counts.most_common(3))


def documents(text: str) -> str | None:
    """Towns of people, and of their teachers, from documents that begin with a name."""
    question = re.search(r"Question: In which town was (the teacher of )?(.+) born\? Answer:$", text)
    if question is None:
        return None
    told = dict(re.findall(r"Document \d+:\n([^\n]+)\n([^\n]+)", text))
    person = question[2]
    if question[1]:
        teacher = re.search(r"learnt from ([^,]+),|lessons of ([^.]+)\.", told[person])
        assert teacher is not None, told[person]
        person = teacher[1] or teacher[2]
    town = re.search(r"(?:born in|people in) (\w+)[ ,]", told[person], re.IGNORECASE)
    assert town is not None, told[person]
    return town[1]


def city_number(text: str) -> str | None:
    """The magic number of a city."""
    question = re.search(r"Question: What is the special magic number of (.+)\?", text)
    if question is None:
        return None
    found = re.search(rf"The special magic number of {re.escape(question[1])} is (\d+)\.", text)
    assert found is not None
    return found[1]


def free_afternoon(text: str) -> str | None:
    """Kamradt's needle goes on where the prompt ends."""
    opening = KamradtTask._OPENING
    if not text.endswith(opening):
        return None
    return text.split(opening + " ")[1].split(".")[0]


def key_of_digits(text: str) -> str | None:
    """The pass key, or the sequence of digits."""
    question = re.search(r"What is the (pass key|sequence of digits)\?", text)
    if question is None:
        return None
    found = re.search(rf"The {question[1]} is (\d+)\.", text)
    assert found is not None
    return found[1]


def json_value(text: str) -> str | None:
    """The value of a key in a JSON object."""
    question = re.search(r'^Key: "([^"]+)"$', text, re.M)
    if question is None:
        return None
    value = json.loads(text[text.index("{") : text.index("}") + 1])[question[1]]
    return str(value)


def list_number(text: str) -> str | None:
    """The nth largest or smallest different number of a list, or its median."""
    question = re.search(
        r"What is the (?:(second|third) )?(largest|smallest|median) number in the following list\?", text
    )
    if question is None:
        return None
    numbers = json.loads(text[text.index("[") : text.index("]") + 1])
    if question[2] == "median":
        return f"{np.median(numbers):g}"
    different = sorted(set(numbers), reverse=question[2] == "largest")
    return str(different[{None: 0, "second": 1, "third": 2}[question[1]]])


def function_value(text: str) -> str | None:
    """What a call returns, by following the calls."""
    question = re.search(r"return value of func_(\d+)\((-?\d+)\)", text)
    if question is None:
        return None
    bodies = dict(re.findall(r"def func_(\d+)\(x\):\n    return (.*)", text))
    name, value = question[1], int(question[2])
    while True:
        body = re.fullmatch(r"(?:func_(\d+)\(x\)|x)(?: ([+-]) (\d+))?", bodies[name].strip())
        assert body is not None, bodies[name]
        value += int((body[2] or "+") + (body[3] or "0"))
        if body[1] is None:
            return str(value)
        name = body[1]


RULES: tuple[Callable[[str], str | None], ...] = (
    magic,
    variables,
    common_words,
    coded_words,
    documents,
    city_number,
    free_afternoon,
    key_of_digits,
    json_value,
    list_number,
    function_value,
)


def answer(text: str) -> str:
    """The answer by the one rule that knows the question."""
    found = [said for rule in RULES if (said := rule(text)) is not None]
    assert len(found) == 1, f"{len(found)} rules know the question ...{text[-300:]!r}"
    return found[0]


# --- models --------------------------------------------------------------------------------------------------------------


@dataclass
class Generated:
    """As mtrain.inference.Generation."""

    tokens: list[int]
    prefill_s: float = 0.0
    decode_s: float = 0.0
    density: float | None = None


@dataclass
class Scored:
    """As mtrain.inference.TokenScores."""

    logprobs: np.ndarray
    density: float | None = None


class Oracle:
    """Answers by rule; of single tokens, what followed the longest earlier repetition of the tokens before (a copying head)."""

    max_positions = 1 << 30
    last_density: float | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def say(self, text: str) -> str:
        """The answer to a prompt."""
        return answer(text)

    def generate(
        self, ids: np.ndarray, max_new_tokens: int, *, stop: Callable[[list[int]], bool] | None = None
    ) -> Generated:
        """See mtrain.inference.Engine."""
        said = self.tokenizer(" " + self.say(str(self.tokenizer.decode(ids.tolist()))), add_special_tokens=False)[
            "input_ids"
        ]
        tokens: list[int] = []
        for token in said[:max_new_tokens]:
            tokens.append(token)
            if stop is not None and stop(tokens):
                break
        return Generated(tokens)

    def predict_at(self, ids: np.ndarray, at: Sequence[int]) -> np.ndarray:
        """See mtrain.inference.Engine."""
        return np.asarray([self.next_token(ids[: place + 1]) for place in at], dtype=np.int64)

    def next_token(self, ids: np.ndarray) -> int:
        """The token after the longest earlier occurrence of the end of ``ids``."""
        places, size = np.flatnonzero(ids[:-1] == ids[-1]), 1
        assert len(places), "the last token never stood before"
        while len(places) > 1:
            longer = places[(places >= size) & (ids[places - size] == ids[-1 - size])]
            if not len(longer):
                break
            places, size = longer, size + 1
        return int(ids[places[-1] + 1])

    def token_logprobs(self, ids: np.ndarray) -> Scored:
        """It knows every text by heart."""
        return Scored(np.zeros(len(ids) - 1, dtype=np.float32))


class Guesser(Oracle):
    """Says something that looks like an answer and has nothing to do with the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, symbols: Sequence[int], seed: int = 0) -> None:
        super().__init__(tokenizer)
        self.symbols, self.random = np.asarray(symbols), random.Random(seed)

    def say(self, text: str) -> str:
        """A number of two to ten digits and two words."""
        number = self.random.randrange(10 ** self.random.choice((2, 5, 7, 10)))
        words = ["".join(self.random.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(2)]
        return f"{number} {' '.join(words)}"

    def next_token(self, ids: np.ndarray) -> int:
        """Any value there is."""
        return int(self.symbols[self.random.randrange(len(self.symbols))])

    def token_logprobs(self, ids: np.ndarray) -> Scored:
        """All tokens are as likely as one another."""
        return Scored(np.full(len(ids) - 1, -np.log(len(self.tokenizer)), dtype=np.float32))


class Chooser(Oracle):
    """Says the value of any key that stands in the prompt: it has found the needles but not read the question."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
        super().__init__(tokenizer)
        self.random = random.Random(seed)

    def say(self, text: str) -> str:
        """One of the values in the prompt."""
        return self.random.choice(candidates(text))


def candidates(text: str) -> list[str]:
    """Values that might be asked for, of RULER's needles or a JSON object."""
    found = [value for _, value in MAGIC.findall(text)]
    return found or re.findall(r'": "([^"]+)"', text)
