"""Train a model as a recipe says: alone on one process, or on dp x outer x inner processes under `accelerate launch`.

mtrain train quickstart train.steps=20
accelerate launch --config_file recipes/accelerate/cpu_2.yaml -m mtrain train quickstart parallel.inner=2
"""

from __future__ import annotations

import argparse
import sys

from mtrain.cli import add_recipe_arguments, split_words
from mtrain.recipe import load_recipe
from mtrain.recipe.advice import warnings


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train to the end of the recipe (or to checkpoint.stop_after)."""
    recipe, overrides = split_words(args.words)
    loaded = load_recipe(recipe, overrides)  # before torch is imported: a misspelt key costs no waiting
    from mtrain.parallel import is_first_process
    from mtrain.trainer import train

    for warning in warnings(loaded) if is_first_process() else ():
        print(f"mtrain: warning: {warning}", file=sys.stderr, flush=True)
    train(loaded)
    return 0
