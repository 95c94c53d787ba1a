"""Text of an exact number of tokens around a needle, for any tokenizer.

Tokens are counted in the text as it will stand: sentences are taken until the next one would not fit, a piece of the next one
fills up, and the whole prompt is tokenised again to see. What a tokenizer does at the seams is found out by trying, not assumed.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.data.tokenizer import encode_texts, is_byte_tokenizer
from mtrain_eval.prose import split_sentences
from mtrain_eval.tokens import encode_prompt

# A piece of a sentence shorter than this many tokens may not exist ("A." are two already); then a sentence makes room for it.
_SHORTEST_PIECE = 8
_LONG_SENTENCE = 800  # characters
_TRIES = 8
_ENDS = (".", "...", "..")


@dataclass(frozen=True)
class Frame:
    """What stands around the haystack and in it: prompt = head + sentences with the needle among them + tail."""

    head: str
    needle: str
    tail: str


@dataclass(frozen=True, eq=False)
class Filled:
    """A prompt: text, ids int64 [n], index of the needle's first token, number of whole sentences."""

    text: str
    ids: np.ndarray
    needle_at: int
    sentences: int


class Haystack:
    """Sentences in a circle, and how many tokens each takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        split = [sentences for text in texts if (sentences := _pieces(text))]
        self.sentences = [sentence for sentences in split for sentence in sentences]
        self.sizes = np.concatenate([_sizes(tokenizer, sentences) for sentences in split])

    def fill(self, frame: Frame, tokens: int, depth: float, start: int) -> Filled:
        """A prompt of exactly ``tokens`` tokens where the tokenizer allows it, else a few fewer; never more.

        Args:
            frame: head, needle and tail; they must fit.
            tokens: of the prompt, special ones included.
            depth: 0 puts the needle before the first sentence, 1 after the last; between, at the end of the sentence that
                comes nearest to this share of the haystack's tokens.
            start: the sentence that the haystack begins with.
        """
        spare = tokens - len(encode_prompt(self.tokenizer, frame.head + frame.needle + frame.tail))
        best: Filled | None = None
        for tries in itertools.count():
            # Where a tokenizer cannot hit the number with this beginning, it can with the next one.
            made = self._assemble(frame, max(spare, 0), depth, start + tries // 2)
            missing = tokens - len(made.ids)
            if missing >= 0 and (best is None or len(made.ids) > len(best.ids)):
                best = made
            if best is not None and (missing == 0 or tries >= _TRIES):
                return best
            assert spare > 0 or missing >= 0, "the frame itself does not fit"
            # After some tries aim lower, so that this ends whatever the tokenizer does.
            spare += missing - max(0, tries - _TRIES + 2) * _SHORTEST_PIECE
        raise AssertionError("unreachable")

    def _assemble(self, frame: Frame, spare: int, depth: float, start: int) -> Filled:
        count, left = self._take(spare, start)
        chosen = [self.sentences[(start + i) % len(self.sentences)] for i in range(count)]
        sizes = self.sizes[(start + np.arange(count)) % len(self.sentences)].tolist()
        piece = self._piece(start + count, left)
        if piece:
            chosen.append(piece)
            sizes.append(left)
        edges = np.concatenate([[0], np.cumsum(sizes)])
        cut = int(np.abs(edges - depth * edges[-1]).argmin()) if 0 < depth < 1 else int(depth) * len(chosen)
        before = frame.head + " ".join(chosen[:cut])
        text = frame.head + " ".join([*chosen[:cut], frame.needle, *chosen[cut:]]) + frame.tail
        ids = encode_prompt(self.tokenizer, text)
        return Filled(text, ids, len(encode_prompt(self.tokenizer, before)), count)

    def _take(self, spare: int, start: int) -> tuple[int, int]:
        """(whole sentences from ``start`` on that fit, tokens left for a piece of the next one)."""
        circle = np.cumsum(np.roll(self.sizes, -(start % len(self.sizes))))
        rounds, rest = divmod(spare, int(circle[-1]))
        fit = int(np.searchsorted(circle, rest, side="right"))
        left = rest - (int(circle[fit - 1]) if fit else 0)
        count = rounds * len(circle) + fit
        if 0 < left < _SHORTEST_PIECE and count:
            left += int(self.sizes[(start + count - 1) % len(self.sizes)])
            count -= 1
        return count, left

    def _piece(self, start: int, tokens: int) -> str:
        """The text from sentence ``start`` on, cut to take ``tokens`` tokens after a space, or as near below as it gets."""
        if tokens <= 0:
            return ""
        text, size = "", 0
        while size < tokens + _SHORTEST_PIECE:
            text += " " * bool(text) + self.sentences[start % len(self.sentences)]
            size += int(self.sizes[start % len(self.sizes)])
            start += 1
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._cost(text[:middle]) <= tokens else (low, middle - 1)
        # Longer beginnings do not always take more tokens, so look around; whole words and one full stop are preferred.
        around = range(max(1, low - 12), min(len(text), low + 6) + 1)
        made = [(_closed(text[:size], end), text[size - 1 : size + 1]) for end in _ENDS for size in around]
        costs = [len(ids) for ids in encode_texts(self.tokenizer, [" " + piece for piece, _ in made])]
        fitting = [
            (cost, " " in seam, -rank, piece)
            for rank, (cost, (piece, seam)) in enumerate(zip(costs, made, strict=True))
            if cost <= tokens
        ]
        return max(fitting)[-1] if fitting else ""

    def _cost(self, beginning: str) -> int:
        return len(encode_texts(self.tokenizer, [" " + _closed(beginning, ".")])[0])


def _pieces(text: str) -> list[str]:
    """Sentences; one that goes on and on is cut between words, or a text without full stops would have no place for a needle."""
    cut: list[str] = []
    for sentence in split_sentences(text):
        cut += [sentence] if len(sentence) <= _LONG_SENTENCE else textwrap.wrap(sentence, _LONG_SENTENCE)
    return cut


def _closed(beginning: str, end: str) -> str:
    return beginning.rstrip(" .,;:") + end


def _sizes(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> np.ndarray:
    """int64 [sentences]: tokens of each with the space before it, counted in the running text."""
    if is_byte_tokenizer(tokenizer):  # no need to look
        return np.array([1 + len(sentence.encode()) for sentence in sentences], dtype=np.int64)
    if not tokenizer.is_fast:  # it knows no places: sentences by themselves, and `fill` counts the whole anyway
        alone = encode_texts(tokenizer, [f" {sentence}" for sentence in sentences])
        return np.array([max(1, len(ids)) for ids in alone], dtype=np.int64)
    text = " " + " ".join(sentences)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = np.sort(np.asarray([begin for begin, _ in spans], dtype=np.int64))
    spaces = np.concatenate([[0], np.cumsum([len(sentence) + 1 for sentence in sentences])])
    return np.diff(np.searchsorted(starts, spaces))
