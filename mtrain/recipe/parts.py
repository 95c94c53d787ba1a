"""Parts of a recipe read on their own, as strictly as whole ones: what evaluation needs of a recipe is its attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrain.errors import RecipeError
from mtrain.recipe.load import find_recipe, number_from, section_from, untyped_from
from mtrain.recipe.schema import AttentionRecipe
from mtrain.recipe.yaml_tree import from_value, parse, read_file


def load_attention(path: str | Path) -> AttentionRecipe:
    """The attention section of a recipe file, or of a file that has this section only; a shipped recipe's name will do.

    Raises:
        RecipeError: no such file, no attention section, or a value in it that makes no sense.
    """
    file = find_recipe(str(path))
    root = read_file(file)
    section = root.value.get("attention") if isinstance(root.value, dict) else None
    if section is None:
        raise RecipeError(f"{file}: has no section 'attention:', which says how attention is to be sparse")
    return section_from(AttentionRecipe, section, "attention")


def attention_from_dict(values: Mapping[str, Any], where: str) -> AttentionRecipe:
    """The attention section of `Recipe.to_dict`, read back; ``where`` names the origin in error messages."""
    return section_from(AttentionRecipe, from_value(dict(values), where), "attention")


def read_size(text: str, what: str) -> int:
    """A whole number of at least 1 as recipes write it: 4096, 4K or 1_000 (K = 1024); ``what`` begins the message.

    Raises:
        RecipeError: something else.
    """
    number = number_from(text.strip())
    if number is None or number != int(number) or number < 1:
        raise RecipeError(f"{what}: expected a whole number such as 4096 or 4K (K = 1024), got {text!r}")
    return int(number)


def read_section(text: str, what: str) -> dict[str, Any]:
    """A section written in one line, such as ``{rope_type: yarn, factor: 4}``; ``what`` begins the message.

    Raises:
        RecipeError: not one YAML section.
    """
    node = parse(text, what, numbered=False)
    if not isinstance(node.value, dict):
        raise RecipeError(f"{what}: expected a section such as '{{rope_type: yarn, factor: 4}}', got {node.describe()}")
    section = untyped_from(node)
    assert isinstance(section, dict)
    return section
