"""From a recipe file and overrides to a `Recipe`: strict, and every error names file, line and the nearest valid key.

recipe = load_recipe("recipes/quickstart.yaml", ["train.steps=20", "data.sources.0.weight=2"])
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import mtrain
from mtrain.errors import RecipeError
from mtrain.recipe.checks import FieldError
from mtrain.recipe.schema import Recipe
from mtrain.recipe.yaml_tree import Node, from_value, parse, read_file

DEFAULT = "quickstart"
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NUMBER = re.compile(r"[+-]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_SIZE = re.compile(r"(\d[\d_]*)([KMGkmg])", re.ASCII)
_MISSING = object()

S = TypeVar("S")


def load_recipe(path: str | Path = DEFAULT, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe such as "quickstart".
        overrides: "dotted.key=value"; a number in the key is an index into a list. The value is YAML if it begins with one of
            `[ { " '`, otherwise it is taken as written.

    Raises:
        RecipeError: with file and line (or the override), what was given, what was expected, and the nearest valid key.
    """
    file = find_recipe(str(path))
    root = read_file(file)
    if root.is_null:
        raise RecipeError(
            f"{file}: is empty; a recipe has at least the sections model, data and train (see {DEFAULT}.yaml)"
        )
    if not isinstance(root.value, dict):
        raise RecipeError(f"{root.where}: expected sections such as 'model:', got {root.describe()}")
    for override in overrides:
        _override(root, override)
    entries = root.value
    entries.setdefault("name", Node(str(file), file.stem))
    if isinstance(entries["name"].value, str):
        entries.setdefault("output", Node(str(file), f"runs/{entries['name'].value}"))
    return section_from(Recipe, Node(str(file), entries), "")


def recipe_from_dict(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The inverse of `Recipe.to_dict`, with the same checks; `where` names the origin in error messages."""
    return section_from(Recipe, from_value(dict(values), where), "")


def _shipped() -> dict[str, Path]:
    """Every YAML file that comes with the package, by name; from the installed package, or from the checkout it is run in."""
    package = Path(mtrain.__file__).parent
    folder = next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), package)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name (`quickstart`). Launch files (`accelerate/cpu_2`) are not recipes."""
    return {name: path for name, path in _shipped().items() if not name.startswith("accelerate/")}


def find_recipe(name: str) -> Path:
    """A file that exists, else the shipped file of that name: `quickstart`, `recipes/quickstart.yaml`, `accelerate/cpu_2`."""
    path = Path(name)
    if path.is_file():
        return path
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    if short in (files := _shipped()):
        return files[short]
    if path.is_dir():
        raise RecipeError(f"{name} is a directory; name a recipe file in it")
    shipped = shipped_recipes()
    beside = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = get_close_matches(name, [*beside, *shipped], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(
        f"no recipe {name}; {hint}give a YAML file or a shipped recipe: {', '.join(shipped) or '(none found)'}"
    )


def _override(root: Node, text: str) -> None:
    """Set one value in the tree. Sections on the way are made when missing; list entries must exist."""
    where = f"override {text!r}"
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"{where}: expected key=value, for example train.steps=100")
    value = (
        parse(raw, where, numbered=False)
        if raw.lstrip()[:1] in tuple("[{\"'")
        else Node(where, raw.strip(), plain=True)
    )
    node = root
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node.value, list):
            index = int(part) if part.isdecimal() else -1
            if not 0 <= index < len(node.value):
                raise RecipeError(
                    f"{where}: {'.'.join(parts[:depth])} is a list of {len(node.value)}; {part!r} is no index into it"
                )
            if last:
                node.value[index] = value
            node = node.value[index]
        else:
            if not isinstance(node.value, dict):
                if not node.is_null and depth:
                    # A shorthand such as `refresh: frozen` gives way to a section.
                    raise RecipeError(
                        f"{where}: {'.'.join(parts[:depth])} is {node.describe()}, which has no key {part!r}"
                    )
                node.value, node.plain = {}, False
            if last:
                node.value[part] = value
            node = node.value.setdefault(part, Node(where, {}))


def _path(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def section_from(cls: type[S], node: Node, prefix: str) -> S:
    """Build one dataclass from a mapping; `prefix` is the section's dotted name."""
    assert dataclasses.is_dataclass(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    here = f"{node.where}: {prefix}: " if prefix else f"{node.where}: "
    if node.is_null:
        node = Node(node.where, {})
    if not isinstance(node.value, dict):
        raise RecipeError(f"{here}expected a section with some of the keys {', '.join(fields)}; got {node.describe()}")
    for key, child in node.value.items():
        if key not in fields:
            raise RecipeError(
                f"{child.where}: unknown key {_path(prefix, key)!r}; {_nearest(key, prefix, list(fields))}"
            )
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, item in fields.items():
        if key in node.value:
            values[key] = _value(hints[key], node.value[key], _path(prefix, key))
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{here}missing key {_path(prefix, key)!r}, {_expected(hints[key])}")
    try:
        return cls(**values)
    except FieldError as error:
        raise RecipeError(f"{_where(node, error.key)}: {_path(prefix, error.key)}: {error.problem}") from None


def _where(node: Node, key: str) -> str:
    """The place of a dotted key below a node, or of its nearest ancestor that was written down."""
    for part in key.split("."):
        if not isinstance(node.value, dict) or part not in node.value:
            break
        node = node.value[part]
    return node.where


def _nearest(key: str, prefix: str, valid: list[str]) -> str:
    """Advice for an unknown key: the nearest key here, else the same key in another section."""
    near = get_close_matches(key, valid, n=1, cutoff=0.5)
    if near and near[0] != key:
        return f"did you mean {_path(prefix, near[0])!r}? Valid keys: {', '.join(valid)}"
    for section, hint in get_type_hints(Recipe).items():
        if dataclasses.is_dataclass(hint) and section != prefix:
            names = [item.name for item in dataclasses.fields(hint)]
            if match := get_close_matches(key, names, n=1, cutoff=0.8):
                return f"did you mean {section + '.' + match[0]!r}? Valid keys here: {', '.join(valid)}"
    return f"valid keys: {', '.join(valid)}"


def _value(hint: Any, node: Node, path: str) -> Any:
    """One value of the wanted type."""
    found = _convert(hint, node, path)
    if found is _MISSING:
        raise RecipeError(f"{node.where}: {path} must be {_expected(hint)}; got {node.describe()}")
    return found


def _convert(hint: Any, node: Node, path: str) -> Any:
    """The value, or _MISSING if this node cannot be of this type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), node, path)
    if origin is Literal:
        return node.value if node.value in get_args(hint) else _MISSING
    if origin is tuple:
        return _convert_list(get_args(hint), node, path)
    if origin is dict:
        return untyped_from(node) if isinstance(node.value, dict) else _MISSING
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return section_from(hint, node, path)
    return _convert_scalar(hint, node)


def _convert_union(options: tuple[Any, ...], node: Node, path: str) -> Any:
    """null, the section that its `kind` (or the only one there is) names, or the first scalar type that fits."""
    if node.is_null and type(None) in options:
        return None
    sections = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    if sections and isinstance(node.value, dict):
        if len(sections) == 1:
            return section_from(sections[0], node, path)
        kinds = {get_args(get_type_hints(option)["kind"])[0]: option for option in sections}
        kind = node.value.get("kind", Node(node.where, next(iter(kinds)), plain=True))
        if not isinstance(kind.value, str) or kind.value not in kinds:
            raise RecipeError(f"{kind.where}: {path}.kind must be one of {', '.join(kinds)}; got {kind.describe()}")
        return section_from(kinds[kind.value], node, path)
    for option in options:
        if option is type(None) or option in sections:
            continue
        if (found := _convert(option, node, path)) is not _MISSING:
            return found
    return _MISSING


def _convert_list(items: tuple[Any, ...], node: Node, path: str) -> Any:
    if not isinstance(node.value, list):
        return _MISSING
    if items[-1] is Ellipsis:
        return tuple(_value(items[0], child, f"{path}.{index}") for index, child in enumerate(node.value))
    if len(items) != len(node.value):
        return _MISSING
    return tuple(
        _value(hint, child, f"{path}.{i}") for i, (hint, child) in enumerate(zip(items, node.value, strict=True))
    )


def _convert_scalar(hint: Any, node: Node) -> Any:
    if not isinstance(node.value, str) or node.is_null:
        return _MISSING
    if hint is str:
        return node.value
    if not node.plain:
        return _MISSING
    if hint is bool:
        return {"true": True, "false": False}.get(node.value.lower(), _MISSING)
    number = number_from(node.value)
    if number is None:
        return _MISSING
    if hint is int:
        return int(number) if number == int(number) else _MISSING
    return float(number)


def number_from(text: str) -> int | float | None:
    """A finite number or a size (512K = 524288), else None. Digits may be grouped: 1_000_000."""
    if size := _SIZE.fullmatch(text):
        return int(size[1]) * UNITS[size[2].upper()]
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    if text.lstrip("+-").replace("_", "").isdecimal():
        return int(text) if len(text) < 300 else None
    number = float(text)
    return number if abs(number) != float("inf") else None


def untyped_from(node: Node) -> Any:
    """Free-form sections (model.config, rope, options): text, number, size, true, false, null, lists, sections."""
    if isinstance(node.value, dict):
        return {key: untyped_from(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [untyped_from(child) for child in node.value]
    if not node.plain:
        return node.value
    if node.is_null:
        return None
    word = node.value.lower()
    if word in ("yes", "no", "on", "off"):
        raise RecipeError(f"{node.where}: {node.value!r} is ambiguous; write true or false, or put the text in quotes")
    if word in ("true", "false"):
        return word == "true"
    number = number_from(node.value)
    return node.value if number is None else number


def _expected(hint: Any) -> str:
    """A type in a person's words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(option) for option in args)
    if origin is Literal:
        return f"one of {', '.join(args)}" if len(args) > 1 else str(args[0])
    if origin is tuple:
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)}: {_expected(args[0])} each"
    if origin is dict:
        return "a section"
    if dataclasses.is_dataclass(hint):
        return f"a section with the keys {', '.join(item.name for item in dataclasses.fields(hint))}"
    words = {
        str: "text",
        int: "a whole number (sizes such as 512K are fine)",
        float: "a number (1e-5 is fine)",
        bool: "true or false",
    }
    return words.get(hint, "null")
