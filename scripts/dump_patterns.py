"""Save the patterns that a trained model chooses on its own training data, for bench_balance.py.

    python scripts/dump_patterns.py runs/quickstart/sparse/export benchmarks/patterns --steps 4
    python scripts/bench_balance.py --patterns benchmarks/patterns/*.safetensors

Reads the recipe that the export remembers (mtrain.json); every step is one optimizer step's rows, one file each: columns_<layer>,
diagonals_<layer> (int32 [B, H, n]), doc_start (int64 [B, S]), metadata seq_len and block.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtrain.comm import SingleRing
from mtrain.data.loader import make_loader
from mtrain.data.tokenizer import load_tokenizer
from mtrain.layout import RingLayout
from mtrain.models import attach, load_model
from mtrain.recipe import ModelRecipe, recipe_from_dict


def main() -> None:
    """Run a few steps' rows through the model and keep the indices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="export directory of a run")
    parser.add_argument("output", type=Path, help="directory for the files")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--block", type=int, help="tokens per block instead of the recipe's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = json.loads((options.export / "mtrain.json").read_text())["recipe"]
    plain["attention"]["block"] = options.block or plain["attention"]["block"]
    recipe = recipe_from_dict(plain)
    model = load_model(ModelRecipe(path=str(options.export))).eval()
    layout = RingLayout.build("contiguous", recipe.train.seq_len, 1, recipe.attention.block)
    attach(model, recipe.attention, SingleRing(), layout)
    loader = make_loader(recipe, load_tokenizer(str(options.export)), dp_rank=0, dp_size=1)
    options.output.mkdir(parents=True, exist_ok=True)
    for step in range(options.steps):
        batches = loader.next_step()
        tokens, starts = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "doc_start"))
        with torch.inference_mode():
            model.base_model(input_ids=tokens, doc_start=starts, use_cache=False)
        tensors = {"doc_start": starts}
        for layer, pattern in model.mtrain_context.latest.index.items():
            assert pattern.columns is not None and pattern.diagonals is not None
            tensors |= {f"columns_{layer}": pattern.columns.clone(), f"diagonals_{layer}": pattern.diagonals.clone()}
        path = options.output / f"step_{step}_block_{recipe.attention.block}.safetensors"
        save_file(tensors, path, metadata={"seq_len": str(layout.seq_len), "block": str(layout.block)})
        print(path)


if __name__ == "__main__":
    main()
