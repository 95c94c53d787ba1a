"""Synthetic retrieval at any length, made on the fly: key-value pairs in a haystack, and needles in prose.

``pairs``: a haystack of library source code holds n pairs `key value` (two single tokens each) at random places; after an
ask symbol come q questions `key value`, and the loss is taken at the q answers only. This is multi-query associative recall
(Arora et al. 2023, "Zoology", arXiv:2312.04927) in the clothes of RULER's multi-key needle (Hsieh et al. 2024,
arXiv:2404.06654).

    [bos] hay k17 v03 hay hay k60 v41 hay ... <|ask|> k60 v41 k17 v03 ...

``needle``: the same with sentences ("The secret number of amber is 40213.") for tokenizers and models that read prose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mtrain.data.packing import Row, Sample, make_row, sample_lengths
from mtrain.data.source import Options, Source, seeded
from mtrain.data.stdlib import TokenizerKey, stdlib_text
from mtrain.data.symbols import symbols_of
from mtrain.data.tokenizer import NUM_SYMBOLS, encode_texts, pad_id
from mtrain.errors import DataError

_WORDS = (
    "amber anchor apple arrow autumn basket beacon birch bridge bronze candle canyon castle cedar cherry cliff "
    "cobalt copper coral cotton crystal desert dragon eagle ember falcon feather forest garden glacier granite "
    "harbor hazel island ivory jasmine jungle lantern lemon linen lotus maple marble meadow meteor mirror needle "
    "ocean olive orchid pearl pepper planet quartz raven river saffron silver spruce summit thunder tulip velvet "
    "willow"
).split()


@dataclass(frozen=True)
class RetrievalTask:
    """What a retrieval sample looks like. Ranges are inclusive; a sample draws one number from each."""

    task: str = "pairs"
    pairs: tuple[int, int] = (4, 32)
    questions: tuple[int, int] = (8, 8)
    late_fraction: float = (
        0.25  # share of the pairs placed within the last `near` haystack tokens: the weak spot of trained models
    )
    near: int = 64
    depth: float | None = None  # of the asked pairs: 0 start, 1 end of the haystack; None: anywhere
    spread: float = 0.05  # asked pairs lie at most this far from `depth`
    haystack: str = "stdlib"
    alphabet: int = NUM_SYMBOLS
    loss: str = "answers"
    digits: int = 5

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> RetrievalTask:
        """From the ``options`` of a recipe's source; DataError for unknown or impossible ones."""
        take = Options(options, "a retrieval source")
        task = take.choice("task", ("pairs", "needle"), "pairs")
        prose = task == "needle"
        alphabet = take.integer("alphabet", NUM_SYMBOLS, low=2)
        made = cls(
            task=task,
            alphabet=alphabet,
            pairs=take.span("pairs", (1, 4) if prose else (min(4, alphabet), min(32, alphabet))),
            questions=take.span("questions", 1 if prose else 8),
            late_fraction=take.fraction("late_fraction", 0.25) or 0.0,
            near=take.integer("near", 64, low=1),
            depth=take.fraction("depth", None),
            spread=take.fraction("spread", 0.05) or 0.0,
            haystack=take.choice("haystack", ("stdlib", "symbols"), "stdlib"),
            loss=take.choice("loss", ("answers", "all"), "answers"),
            digits=take.integer("digits", 5, low=1),
        )
        take.done()
        limit = len(_WORDS) if prose else alphabet
        if made.pairs[1] > limit:
            raise DataError(
                f"data: {made.pairs[1]} pairs need as many different keys, but there are {limit}; lower `pairs`"
                + ("" if prose else " or raise `alphabet`")
            )
        return made


class RetrievalMaker:
    """Makes retrieval samples of a given length; one per (tokenizer, task, split)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: RetrievalTask, *, held_out: bool = False) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.symbols = (
            symbols_of(tokenizer, task.alphabet) if task.task == "pairs" or task.haystack == "symbols" else None
        )
        if task.haystack == "symbols" and self.symbols is not None and len(self.symbols.fillers) == 0:
            raise DataError("data: this tokenizer has no word left for a haystack of symbols; use `haystack: stdlib`")
        self.head = np.array([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=np.int64)
        self.hay = stdlib_text(TokenizerKey(tokenizer), held_out) if task.haystack == "stdlib" else None

    def shortest(self) -> int:
        """Smallest sample length (tokens) that surely holds the largest sample of the task and some haystack."""
        pairs, questions = self.task.pairs[1], min(self.task.questions[1], self.task.pairs[1])
        if self.task.task == "pairs":
            return len(self.head) + 2 * pairs + 1 + 2 * questions + 1
        longest = max(
            len(ids)
            for ids in encode_texts(self.tokenizer, [self._sentence(word, "8" * self.task.digits) for word in _WORDS])
        )
        return len(self.head) + (longest + 2) * (pairs + questions) + 1

    def make(self, rng: np.random.Generator, length: int) -> tuple[Sample, np.ndarray]:
        """A sample of exactly ``length`` tokens, and the depth (0..1) of each asked pair in the order of the questions."""
        pairs = int(rng.integers(self.task.pairs[0], self.task.pairs[1] + 1))
        questions = min(int(rng.integers(self.task.questions[0], self.task.questions[1] + 1)), pairs)
        asked = rng.permutation(pairs)[:questions]
        inserts, tail, targets = (self._symbols if self.task.task == "pairs" else self._prose)(rng, pairs, asked)
        sizes = np.array([len(ids) for ids in inserts])
        hay = length - len(self.head) - int(sizes.sum()) - len(tail)
        if hay < 1:
            raise DataError(
                f"data: {pairs} pairs and {questions} questions do not fit in a sample of {length} tokens; "
                f"it takes {self.shortest()}"
            )
        gaps = self._gaps(rng, hay, pairs, asked)
        order = np.argsort(gaps, kind="stable")
        before = np.cumsum(sizes[order]) - sizes[order]
        starts = np.empty(pairs, dtype=np.int64)
        starts[order] = gaps[order] + before
        body = np.empty(hay + int(sizes.sum()), dtype=np.int64)
        free = np.ones(len(body), dtype=bool)
        for start, ids in zip(starts, inserts, strict=True):
            body[start : start + len(ids)] = ids
            free[start : start + len(ids)] = False
        body[free] = self._haystack(rng, hay)
        tokens = np.concatenate([self.head, body, tail])
        wanted = np.ones(length, dtype=bool)
        if self.task.loss == "answers":
            wanted = np.concatenate([np.zeros(length - len(tail), dtype=bool), targets])
        return Sample(tokens, wanted), starts[asked] / len(body)

    def _gaps(self, rng: np.random.Generator, hay: int, pairs: int, asked: np.ndarray) -> np.ndarray:
        """Where each pair goes: the number of haystack tokens before it, 0..hay."""
        task = self.task
        gaps = rng.integers(0, hay + 1, pairs)
        late = rng.random(pairs) < task.late_fraction
        gaps[late] = hay - rng.integers(0, min(task.near, hay + 1), int(late.sum()))
        if task.depth is not None:
            places = (task.depth + task.spread * (2 * rng.random(len(asked)) - 1)) * hay
            gaps[asked] = np.clip(np.rint(places).astype(np.int64), 0, hay)
        return gaps

    def _haystack(self, rng: np.random.Generator, count: int) -> np.ndarray:
        if self.hay is None:
            assert self.symbols is not None
            return self.symbols.fillers[rng.integers(0, len(self.symbols.fillers), count)]
        start = int(rng.integers(0, len(self.hay)))
        text = self.hay[start : start + count]
        if len(text) < count:  # past the end: go on at the beginning, as often as it takes
            text = self.hay[np.arange(start, start + count) % len(self.hay)]
        return text.astype(np.int64)

    def _symbols(
        self, rng: np.random.Generator, pairs: int, asked: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """(inserted pairs, [ask, k, v, k, v, ..], which of these are answers)."""
        symbols = self.symbols
        assert symbols is not None
        both = np.stack(
            [
                symbols.keys[rng.permutation(len(symbols.keys))[:pairs]],
                symbols.values[rng.integers(0, len(symbols.values), pairs)],
            ],
            axis=1,
        )
        tail = np.concatenate([[symbols.ask], both[asked].reshape(-1)])
        targets = np.arange(len(tail)) % 2 == 0
        targets[0] = False
        return list(both), tail, targets

    def _prose(
        self, rng: np.random.Generator, pairs: int, asked: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """(needle sentences, questions with answers, which tokens belong to answers)."""
        words = [_WORDS[i] for i in rng.permutation(len(_WORDS))[:pairs]]
        low = 10 ** (self.task.digits - 1)
        numbers = [str(x) for x in rng.integers(low, 10 * low, pairs)]
        texts = [self._sentence(word, number) for word, number in zip(words, numbers, strict=True)]
        for i in asked:
            texts += ["\n" + self._sentence(words[i], ""), f" {numbers[i]}."]
        ids = encode_texts(self.tokenizer, texts)
        tail = np.concatenate(ids[pairs:])
        targets = np.concatenate([np.full(len(part), i % 2 == 1) for i, part in enumerate(ids[pairs:])])
        return ids[:pairs], tail, targets

    @staticmethod
    def _sentence(word: str, number: str) -> str:
        start = f" The secret number of {word} is"
        return f"{start} {number}." if number else start.strip()


class RetrievalSource(Source):
    """Rows of retrieval samples of ``length`` tokens; what remains of a row holds a shorter sample if one fits, else padding."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: RetrievalTask,
        *,
        name: str,
        seed: int,
        seq_len: int,
        packing: bool = True,
        length: int | None = None,
        held_out: bool = False,
    ) -> None:
        self.name, self.seed, self.seq_len, self.pad = name, seed, seq_len, pad_id(tokenizer)
        self.maker = RetrievalMaker(tokenizer, task, held_out=held_out)
        self.lengths = sample_lengths(seq_len, length, packing, self.maker.shortest(), name)

    def row(self, index: int) -> Row:
        """See :meth:`Source.row`."""
        rng = seeded(self.seed, self.name, index)
        return make_row([self.maker.make(rng, n)[0] for n in self.lengths], self.seq_len, self.pad)


@dataclass(frozen=True)
class Prompts:
    """Evaluation samples. Position ``at`` predicts the answer: ``tokens[i, at[i, j] + 1] == answers[i, j]``.

    tokens int64 [count, length]; at, answers int64 [count, questions]; depths float64 [count, questions] in 0..1.
    """

    tokens: torch.Tensor
    at: torch.Tensor
    answers: torch.Tensor
    depths: torch.Tensor


def retrieval_prompts(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float | None,
    count: int,
    seed: int,
    *,
    pairs: int = 32,
    questions: int = 1,
    haystack: str = "stdlib",
    alphabet: int = NUM_SYMBOLS,
    spread: float = 0.05,
    held_out: bool = True,
) -> Prompts:
    """``count`` key-value samples of ``length`` tokens whose asked pairs lie around ``depth`` (None: anywhere; see ``depths``).

    The haystack is held-out library source by default, so no prompt repeats training text. With several questions the
    earlier answers stand in the context of the later ones (teacher forcing), which a causal model may not copy from,
    because keys differ. The same arguments give the same prompts, whatever model is measured.
    """
    task = RetrievalTask(
        pairs=(pairs, pairs),
        questions=(questions, questions),
        late_fraction=0.0,
        depth=depth,
        spread=spread,
        haystack=haystack,
        alphabet=alphabet,
    )
    if not 1 <= questions <= pairs <= alphabet:
        raise DataError(
            f"data: {questions} questions on {pairs} pairs of {alphabet} keys; expected 1 <= questions <= pairs <= alphabet"
        )
    maker = RetrievalMaker(tokenizer, task, held_out=held_out)
    if length < maker.shortest():
        raise DataError(
            f"data: prompts of {length} tokens cannot hold {pairs} pairs and {questions} questions; they take {maker.shortest()}"
        )
    made = [maker.make(seeded(seed, "prompts", length, depth, i), length) for i in range(count)]
    tokens = torch.from_numpy(np.stack([sample.tokens for sample, _ in made]))
    at = (length - 2 * questions + 2 * torch.arange(questions)).expand(count, questions)
    depths = torch.from_numpy(np.stack([where for _, where in made]))
    return Prompts(tokens, at, tokens.gather(1, at + 1), depths)
