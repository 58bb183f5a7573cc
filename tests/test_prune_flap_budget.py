"""FLAP's ways of sharing a removal out: the target to less than one neuron, layers alike or by score."""

from __future__ import annotations

import pytest
import torch

from compressor.errors import UsageError
from compressor.pruning.unit_budget import UnitPool, share_out, weakest, weights_of

HEAD, NEURON = 100, 7
LAYERS = 3


def pools(seed: int = 0) -> list[UnitPool]:
    """Heads and neurons of three layers: 8 heads of 100 weights, 50 neurons of 7."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for layer in range(LAYERS):
        heads = torch.randn(8, generator=generator) + layer
        neurons = torch.randn(50, generator=generator) - layer
        made.append(UnitPool("heads", heads.sort().values, HEAD, 1))
        made.append(UnitPool("neurons", neurons.sort().values, NEURON))
    return made


TOTAL = LAYERS * (8 * HEAD + 50 * NEURON)


@pytest.mark.parametrize("allocation", ["AL-AM", "UL-UM"])
@pytest.mark.parametrize("budget", [0, 6, 7, 99, 345, 700, 1600, 2400])
def test_prune_flap_budget_is_met_to_less_than_one_neuron(allocation: str, budget: int) -> None:
    """What goes never exceeds the budget, and one more neuron would."""
    counts = share_out(pools(), budget, allocation)
    assert 0 <= budget - weights_of(pools(), counts) < NEURON


@pytest.mark.parametrize("allocation", ["AL-MM", "UL-MM"])
def test_prune_flap_given_heads_go_and_neurons_fill_up(allocation: str) -> None:
    """Six heads go, over all layers or two in each, and neurons for the rest of the budget."""
    counts = share_out(pools(), 1000, allocation, heads=6)
    assert sum(counts[0::2]) == 6
    assert 0 <= 1000 - weights_of(pools(), counts) < NEURON
    if allocation == "UL-MM":
        assert counts[0::2] == (2, 2, 2)


def test_prune_flap_uniform_layers_differ_by_one_neuron_at_most() -> None:
    """UL-UM takes as many heads in each layer, and neurons but for what whole ones leave over."""
    counts = share_out(pools(), 1000, "UL-UM")
    assert len(set(counts[0::2])) == 1
    assert max(counts[1::2]) - min(counts[1::2]) <= 1
    assert counts[0] == int(8 * 1000 / TOTAL)


def test_prune_flap_adaptive_takes_the_lowest_scores_first() -> None:
    """Until a head does not fit any more, nothing that stays has a lower score than something that goes."""
    made = pools()
    counts = weakest(made, range(len(made)), 1000)
    gone = [float(score) for pool, count in zip(made, counts, strict=True) for score in pool.scores[:count]]
    neurons_left = [
        float(score)
        for pool, count in zip(made, counts, strict=True)
        for score in pool.scores[count : pool.removable]
        if pool.kind == "neurons"
    ]
    assert max(gone) <= min(neurons_left)


def test_prune_flap_adaptive_weighs_units_by_their_weights() -> None:
    """Of a head and neurons of equal standing a budget for the head alone takes the head, then no neuron fits."""
    made = [
        UnitPool("heads", torch.tensor([-1.0, 5.0]), HEAD, 1),
        UnitPool("neurons", torch.tensor([0.0] * 5), NEURON),
    ]
    assert weakest(made, range(2), HEAD) == (1, 0)
    assert weakest(made, range(2), HEAD - 1) == (0, 4)


def test_prune_flap_leaves_the_last_unit_of_every_group() -> None:
    """However low its scores and high the budget, no group loses all its units."""
    counts = share_out(pools(), TOTAL, "AL-AM")
    assert counts == (7, 49) * LAYERS


def test_prune_flap_refuses_more_heads_than_the_budget_has() -> None:
    """Heads that alone exceed the target are a contradiction in the recipe."""
    with pytest.raises(UsageError, match="600 weights, the sparsity allows 500") as refused:
        share_out(pools(), 500, "UL-MM", heads=6)
    assert refused.value.error_id == "E-FLAP-HEADS"


def test_prune_flap_allocation_repeats_exactly() -> None:
    """Equal scores, equal counts: ties go to the first pool."""
    made = [UnitPool("neurons", torch.zeros(10), NEURON) for _ in range(3)]
    assert weakest(made, range(3), 12 * NEURON) == (9, 3, 0)
    assert share_out(pools(), 800, "AL-AM") == share_out(pools(), 800, "AL-AM")
