"""Recipes: one YAML file is one run that can be repeated from its name."""

from mtrain.recipe.load import find_recipe, load_recipe, recipe_from_dict, shipped_recipes
from mtrain.recipe.schema import (
    AttentionRecipe,
    CheckpointRecipe,
    CoverageBudget,
    DataRecipe,
    LogRecipe,
    ModelRecipe,
    ParallelRecipe,
    Recipe,
    RefreshEvery,
    SourceRecipe,
    TopKBudget,
    TrainRecipe,
)

__all__ = [
    "AttentionRecipe",
    "CheckpointRecipe",
    "CoverageBudget",
    "DataRecipe",
    "LogRecipe",
    "ModelRecipe",
    "ParallelRecipe",
    "Recipe",
    "RefreshEvery",
    "SourceRecipe",
    "TopKBudget",
    "TrainRecipe",
    "find_recipe",
    "load_recipe",
    "recipe_from_dict",
    "shipped_recipes",
]
