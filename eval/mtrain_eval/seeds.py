"""Randomness of a sample: a hash of what it is, so that nothing else can change it."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def sample_seed(seed: int, task: str, length: int, index: int, *more: str | int) -> int:
    """64 bits from (seed, task, length, index, ...), the same on every machine and in every version of Python."""
    words = "\x1f".join(str(word) for word in (seed, task, length, index, *more))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")


def sample_rng(seed: int, task: str, length: int, index: int, *more: str | int) -> np.random.Generator:
    """A numpy generator for one sample; ``more`` tells independent streams of one sample apart."""
    return np.random.default_rng(sample_seed(seed, task, length, index, *more))


def sample_random(seed: int, task: str, length: int, index: int, *more: str | int) -> random.Random:
    """The same as Python's own generator, for shuffling and choosing among lists."""
    return random.Random(sample_seed(seed, task, length, index, *more))
