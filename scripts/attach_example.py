"""Sparse ring attention in your own Accelerate loop: what `mtrain train` does, for a model of your own.

Alone:      python scripts/attach_example.py
Two ranks:  accelerate launch --config_file recipes/accelerate/cpu_2.yaml scripts/attach_example.py    (the same losses)
"""

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Qwen2Config

from mtrain.comm import ProcessRing, SingleRing
from mtrain.layout import RingLayout
from mtrain.models import attach, install_loss_head, scaled_loss
from mtrain.parallel import launched_world_size
from mtrain.recipe import AttentionRecipe, TopKBudget
from mtrain.topology import RingTopology

SEQ_LEN, VOCAB, STEPS = 1000, 64, 8


def main() -> None:
    """Teach a tiny random Qwen2 to count by sevens."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    ranks = accelerator.num_processes
    assert ranks == launched_world_size(), (
        "Accelerate did not join the launched processes: see recipes/accelerate/cpu_2.yaml"
    )
    torch.manual_seed(0)  # the same weights and the same rows on every rank of the ring
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)

    ring = ProcessRing.create(RingTopology(outer=1, inner=ranks)) if ranks > 1 else SingleRing()
    recipe = AttentionRecipe(pattern="vertical_slash", block=64, budget=TopKBudget(columns=32, slashes=4), local=64)
    layout = RingLayout.build(recipe.layout, SEQ_LEN, ranks, recipe.block)
    install_loss_head(attach(model, recipe, ring, layout))
    context = model.mtrain_context
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))

    for step in range(STEPS):
        row = (torch.randint(VOCAB, (1, 1)) + 7 * torch.arange(SEQ_LEN)) % VOCAB
        labels = torch.nn.functional.pad(row[:, 1:], (0, 1), value=-100)  # shifted before sharding
        tokens = layout.shard(row, ring.rank, dim=1).to(accelerator.device)
        targets = layout.shard(labels, ring.rank, dim=1)
        targets[:, layout.positions(ring.rank) >= SEQ_LEN] = -100  # the layout pads to whole blocks
        loss_sum = model(input_ids=tokens, shift_labels=targets.to(accelerator.device)).loss
        valid = int((labels != -100).sum())
        accelerator.backward(scaled_loss(loss_sum, valid, num_averaged_ranks=ranks))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss, density = accelerator.reduce(loss_sum.detach(), "sum") / valid, context.statistics()["density"]
        accelerator.print(f"step {step}  loss {loss.item():.4f}  density {density:.3f}  ranks {ranks}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
