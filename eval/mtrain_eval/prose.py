"""Prose for haystacks: Paul Graham's essays where they are at hand, else sentences made by rule.

The made prose is English in form and says nothing, has no digits and no words of the needles, so a needle in it is the only
thing that answers a question. It is a stand-in: whatever is measured with it is ``synthetic``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from mtrain.data.documents import open_hf
from mtrain.errors import DataError, EvalError
from mtrain_eval.sample import SuiteOptions
from mtrain_eval.seeds import sample_rng
from mtrain_eval.texts import read_texts, texts_of

ESSAYS = "paul_graham_essays"
_HUB = "baber/paul_graham_essays"
# As much as the original collection: about 650 KB in 49 texts.
_MADE_ESSAYS, _MADE_SENTENCES = 49, 170

_PEOPLE = (
    "farmer sailor teacher baker painter miller printer weaver gardener carpenter surgeon librarian tailor mason "
    "clerk pilot shepherd cook singer judge student merchant potter nurse sculptor captain porter blacksmith"
).split()
_THINGS = (
    "ladder letter window kettle wagon lamp blanket fence barrel mirror hammer basket clock ledger saddle drum "
    "curtain bottle chair kite ribbon compass bucket rope shovel cabinet violin map stove wheel coat pump bell brush "
    "pencil whistle bench button candle chest plough sail stamp thread tray"
).split()
_PLACES = (
    "harbour market valley station orchard workshop village meadow library bridge cellar kitchen chapel quarry mill "
    "stable garden tower courtyard ferry attic theatre dairy forge lighthouse pasture school warehouse"
).split()
_QUALITIES = (
    "quiet heavy narrow patient weathered cheerful careful rusty gentle crooked steady bright hollow stubborn modest "
    "clumsy polished distant faded frank curious plain wooden weary sturdy pale generous rough simple grey lively "
    "worn silent broad thin humble restless tidy bitter mild"
).split()
_ACTS = (
    "repaired carried painted borrowed measured described traded noticed remembered studied cleaned polished lifted "
    "moved followed admired opened lost found kept mended sketched counted sold stored inspected ignored praised weighed "
    "covered returned replaced"
).split()
_TIMES = (
    "in the morning|before winter|after the storm|at noon|during the harvest|late in the evening|on most days|"
    "without any hurry|for the second time|long before dawn|once the rain had stopped|in the following spring"
).split("|")
_THOUGHTS = (
    "the work would take longer than planned|nobody had asked the right question|a small change was often enough|"
    "the old method was still the better one|most plans look simple from far away|good tools outlast good intentions|"
    "there was no reason to decide so early|what is easy to explain is easy to forget|the price had never mattered much|"
    "people mostly see what they expect to see|the first attempt teaches more than the last|it is hard to be both quick and careful"
).split("|")

# Words in braces are drawn anew for each sentence: p person, t thing, l place, q quality, a act, w when, c thought.
_FORMS = (
    "The {q} {p} {a} the {t} near the {l}.",
    "{W}, the {p} {a} a {q} {t} and said that {c}.",
    "Nobody in the {l} {a} the {t}, because {c}.",
    "It was {w} that the {p} from the {l} finally {a} the {q} {t}.",
    "A {p} who {a} every {t} in the {l} must have known that {c}.",
    "The {t} stood beside the {q} {l}, and the {p} hardly {a} it.",
    "Some believed that {c}, while the {q} {p} believed the opposite.",
    "When the {p} {a} the {t} {w}, the whole {l} became {q}.",
    "There is something {q} about a {t} that a {p} has {a} {w}.",
    "The {p} {a} the {t}, the {q} {p} {a} the {l}, and still {c}.",
    "If the {l} had been less {q}, the {p} would have {a} the {t} {w}.",
    "Looking back, the {p} understood that {c}.",
)
_DRAWS = {"p": _PEOPLE, "t": _THINGS, "l": _PLACES, "q": _QUALITIES, "a": _ACTS, "w": _TIMES, "c": _THOUGHTS}
_SLOT = re.compile(r"\{(\w)\}")
_END = re.compile(r"([.!?][\"'”’)\]]*) (?=[\"'“‘(\[]?[A-Z0-9])")
_MOST_SLOTS = max(len(_SLOT.findall(form)) for form in _FORMS)


def synthetic_prose(rng: np.random.Generator, sentences: int) -> list[str]:
    """``sentences`` English sentences, each with its full stop; about 13 words and 70 characters each, no digits."""
    draws = rng.integers(0, 1 << 31, (sentences, _MOST_SLOTS + 1))
    return [_sentence(row) for row in draws.tolist()]


def _sentence(draws: list[int]) -> str:
    numbers = iter(draws[1:])

    def fill(slot: re.Match[str]) -> str:
        letter = slot[1]
        words = _DRAWS[letter.lower()]
        word = words[next(numbers) % len(words)]
        return word[0].upper() + word[1:] if letter.isupper() else word

    return _SLOT.sub(fill, _FORMS[draws[0] % len(_FORMS)])


def essay_source(options: SuiteOptions) -> str:
    """The source of what `load_essays` will return, as there; reads no text.

    Raises:
        EvalError: a folder of essays without any.
    """
    return "local" if _files(options) else "published" if options.online else "synthetic"


def missing_essays(options: SuiteOptions) -> str | None:
    """What is missing in a data directory that was given, and what to do; None: nothing is, or none was given."""
    if options.data_dir is None or essay_source(options) != "synthetic":
        return None
    return (
        f"no essays in {Path(options.data_dir) / ESSAYS}: put PaulGrahamEssays.json of NVIDIA/RULER "
        f"(scripts/data/synthetic/json), or the essays as .txt files, there; or give --online to fetch {_HUB}; or leave out "
        "--data-dir for made-up prose"
    )


def load_essays(options: SuiteOptions) -> tuple[list[str], str]:
    """(essays as whole texts, their source).

    ``local`` from DATA_DIR/paul_graham_essays (*.txt, *.md, or *.json, *.jsonl with a field ``text``), else ``published`` from
    the hub when online, else ``synthetic``, made by rule from the seed: as many and as long as the originals.

    Raises:
        EvalError: files that cannot be read or hold no text, or a hub that does not answer, with what to do instead.
    """
    files = _files(options)
    if files:
        texts = _local(tuple(files))
        if not texts:
            raise EvalError(f"data-dir: {files[0].parent} holds no text; put the essays there, or take the folder away")
        return list(texts), "local"
    if options.online:
        return list(_fetched()), "published"
    return list(_made(options.seed)), "synthetic"


def split_sentences(text: str) -> list[str]:
    """A text as sentences with their end marks, white space between words made one space; nothing else is lost.

    A sentence ends after ``.``, ``!`` or ``?`` (and closing quotes or brackets) before a space and a capital letter, digit
    or opening quote: no language model, so "Mr. Smith" counts as an end; a haystack does not mind.
    """
    plain = " ".join(text.split())
    ends = [match.end(1) for match in _END.finditer(plain)]
    starts = [0, *(end + 1 for end in ends)]
    return [piece for start, end in zip(starts, [*ends, len(plain)], strict=True) if (piece := plain[start:end])]


def _files(options: SuiteOptions) -> list[Path]:
    return texts_of(options, ESSAYS, "the essays")


@lru_cache(maxsize=2)
def _local(files: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(document.text for document in read_texts(list(files)) if document.text.strip())


@lru_cache(maxsize=1)
def _fetched() -> tuple[str, ...]:
    try:
        rows = open_hf(_HUB, None, "train", streaming=False)
    except DataError as error:
        raise EvalError(
            f"{error}; without a network put the essays as text files into DATA_DIR/{ESSAYS} and give --data-dir DATA_DIR, "
            "or leave out --online for made-up prose"
        ) from error
    return tuple(str(text) for text in rows["text"])


@lru_cache(maxsize=4)
def _made(seed: int) -> tuple[str, ...]:
    return tuple(
        " ".join(synthetic_prose(sample_rng(seed, "essays", _MADE_SENTENCES, index), _MADE_SENTENCES))
        for index in range(_MADE_ESSAYS)
    )
