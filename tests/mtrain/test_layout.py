"""Layouts and topologies: every block has one owner, sharding is lossless, shards visit each rank exactly once."""

import pytest
import torch

from mtrain.errors import MtrainError
from mtrain.layout import LAYOUTS, RingLayout, padded_blocks
from mtrain.topology import RingTopology


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seq_len", [1, 7, 64, 129, 515])
def test_every_token_has_one_owner_and_comes_back(kind, ranks, seq_len):
    layout = RingLayout.build(kind, seq_len, ranks, 8)
    positions = torch.cat([layout.positions(rank) for rank in range(ranks)])
    assert sorted(positions.tolist()) == list(range(layout.padded_len))
    x = torch.randn(2, seq_len, 3)
    parts = [layout.shard(x, rank, 1) for rank in range(ranks)]
    assert all(part.shape == (2, layout.local_len, 3) for part in parts)
    assert torch.equal(layout.unshard(parts, 1), x)
    for rank, part in enumerate(parts):
        assert not part[:, layout.positions(rank) >= seq_len].any(), "padding must be zero"
        assert torch.equal(layout.owner[layout.blocks(rank)], torch.full((layout.blocks_per_rank,), rank))
        assert torch.equal(layout.blocks(rank)[layout.slot[layout.blocks(rank)]], layout.blocks(rank))


def test_kinds_place_blocks_as_documented():
    assert RingLayout.build("contiguous", 64, 2, 8).table.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert RingLayout.build("zigzag", 64, 2, 8).table.tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert RingLayout.build("striped", 64, 2, 8).table.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assignment = [1, 0, 0, 1, 1, 0, 0, 1]
    assert RingLayout.build("balanced", 64, 2, 8, assignment).table.tolist() == [[1, 2, 5, 6], [0, 3, 4, 7]]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ([0] * 8, "each of 2 ranks must own exactly 4"),
        ([0, 1] * 3, "this layout has 8"),
        ([0, -1] * 4, "must own exactly"),
    ],
)
def test_bad_assignments_are_refused(assignment, message):
    with pytest.raises(MtrainError, match=message):
        RingLayout.build("balanced", 64, 2, 8, assignment)


def test_bad_layouts_are_refused():
    with pytest.raises(MtrainError, match="unknown layout 'stripe'; choose one of contiguous"):
        RingLayout.build("stripe", 64, 2, 8)
    with pytest.raises(MtrainError, match="goes with layout 'balanced'"):
        RingLayout.build("striped", 64, 2, 8, [0, 1] * 4)
    with pytest.raises(MtrainError, match="this layout is for 64 tokens"):
        RingLayout.build("striped", 64, 2, 8).shard(torch.zeros(1, 65), 0, 1)
    with pytest.raises(MtrainError, match="outer >= 1"):
        RingTopology(0, 2)


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 4), (2, 2), (3, 2), (2, 4)])
def test_every_shard_visits_every_rank_once_along_the_ring(outer, inner):
    topology = RingTopology(outer, inner)
    for rank in range(topology.world_size):
        seen = [topology.owner(rank, s, t) for s in range(outer) for t in range(inner)]
        assert sorted(seen) == list(range(topology.world_size)) and seen[0] == rank
        for s in range(outer):
            for t in range(inner - 1):
                assert topology.owner(topology.next(rank, "inner"), s, t + 1) == topology.owner(rank, s, t)
            if s + 1 < outer:
                assert topology.owner(topology.next(rank, "outer"), s + 1, 0) == topology.owner(rank, s, 0)


def test_padding_is_whole_blocks_per_rank():
    assert padded_blocks("striped", 65, 4, 8) == 12
    assert padded_blocks("zigzag", 65, 4, 8) == 16
