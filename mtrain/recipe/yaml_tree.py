"""YAML as text with line numbers: a tree that keeps what was written and where, and decides no types.

YAML guesses types: `1e-5` is text, `no` is false, `12:30:45` is 45045, and of two equal keys the last one wins. Here a scalar
stays the text that was written until the reader knows which type the recipe wants. Tags and aliases are refused: no code, no
blow-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtrain.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


@dataclass
class Node:
    """A value with its place.

    Attributes:
        where: "file:line" of its key (or of itself in a list), or the override that set it: begins every error message.
        value: text of a scalar, entries of a mapping or of a list.
        plain: a scalar written without quotes, which may therefore mean a number, true, false or null.
    """

    where: str
    value: str | dict[str, Node] | list[Node]
    plain: bool = False

    @property
    def is_null(self) -> bool:
        """null, ~ or nothing at all."""
        return self.plain and self.value in ("", "~", "null", "Null", "NULL")

    def describe(self) -> str:
        """What was given, in words."""
        if isinstance(self.value, dict):
            return f"a section with the keys {', '.join(self.value)}" if self.value else "an empty section"
        if isinstance(self.value, list):
            return f"a list of {len(self.value)}"
        if self.is_null:
            return "nothing"
        return self.value if self.plain else f"the text {self.value!r}"


def read_file(path: Path) -> Node:
    """The recipe file as a tree.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8, is too long, or is not one YAML mapping without tags and aliases.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: {len(raw)} bytes; a recipe has at most {MAX_BYTES}. Is this a data file?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the recipe as UTF-8"
        ) from None
    return parse(text, str(path))


def parse(text: str, name: str, numbered: bool = True) -> Node:
    """Parse one YAML document; `name` is how messages call the text, with the line number behind it if `numbered`."""
    try:
        return _Parser(text, name, numbered).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None and numbered else name
        reason = " ".join(part for part in (error.problem, error.context) if part)
        hint = "; quote the value if it is a glob" if "alias" in reason else ""
        raise RecipeError(f"{where}: not valid YAML: {reason}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{name}:{line}: not valid YAML: character #x{error.character:04x} is not allowed") from None


def from_value(value: Any, where: str) -> Node:
    """Python values (as read from JSON) as a tree."""
    if isinstance(value, dict):
        return Node(where, {str(key): from_value(item, where) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return Node(where, [from_value(item, where) for item in value])
    if isinstance(value, str):
        return Node(where, value)
    if value is None or isinstance(value, bool):
        return Node(where, {None: "null", True: "true", False: "false"}[value], plain=True)
    return Node(where, repr(value), plain=True)


class _Parser:
    """Recursive descent over the parser's events, where tags, aliases, quotes and lines are still visible."""

    def __init__(self, text: str, name: str, numbered: bool) -> None:
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.name = name
        self.numbered = numbered

    def document(self) -> Node:
        next(self.events)  # stream start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return Node(self.name, "", plain=True)
        node = self.node(next(self.events), 0)
        next(self.events)  # document end
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise RecipeError(
                f"{self.where(event)}: a second document starts here; a recipe is one document, remove the '---'"
            )
        return node

    def where(self, event: Any) -> str:
        return f"{self.name}:{event.start_mark.line + 1}" if self.numbered else self.name

    def node(self, event: Any, depth: int) -> Node:
        where = self.where(event)
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(
                f"{where}: aliases such as *{event.anchor} are not supported; write the value out, or quote a glob"
            )
        if event.tag is not None:
            raise RecipeError(f"{where}: the tag {event.tag!r} is not allowed; a recipe holds plain values only")
        if depth > MAX_DEPTH:
            raise RecipeError(f"{where}: nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.ScalarEvent):
            return Node(where, event.value, plain=event.style is None)
        if isinstance(event, yaml.SequenceStartEvent):
            return Node(where, self.sequence(depth + 1))
        return Node(where, self.mapping(depth + 1))

    def sequence(self, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, depth))
        return items

    def mapping(self, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth)
            if not isinstance(key.value, str):
                raise RecipeError(f"{key.where}: a key must be a word, got {key.describe()}")
            if key.value in entries:
                raise RecipeError(
                    f"{key.where}: duplicate key {key.value!r}, first given at {entries[key.value].where}"
                )
            value = self.node(next(self.events), depth)
            # The line of the key is where a person looks, also when the value begins on the next line.
            entries[key.value] = Node(key.where, value.value, value.plain)
        return entries
