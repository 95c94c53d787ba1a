"""Perplexity on books (PG-19, Rae et al. 2020, arXiv 1911.05507).

pg19           the first L tokens of every book of at least L tokens, in one pass of full length
pg19_rolling   windows of L tokens over the whole of every book, half of each new

The books come from DATA_DIR/pg19 (text files, or JSON lines with a field ``text``; source: local), or the hub with --online
(source: published); otherwise library source that mtrain holds out of training takes their place (source: synthetic).
"""

from __future__ import annotations

from mtrain_eval.pg19.books import Books
from mtrain_eval.pg19.task import BooksRolling, BooksWhole
from mtrain_eval.sample import SuiteOptions, Task


def tasks(options: SuiteOptions) -> list[Task]:
    """Both tasks over the same books."""
    books = Books(options)
    return [BooksWhole(options, books), BooksRolling(options, books)]


def missing(name: str, options: SuiteOptions) -> str | None:
    """What a task lacks in the data directory that was given, and what to do; None: nothing."""
    return Books(options).missing() if name in (BooksWhole.name, BooksRolling.name) else None
