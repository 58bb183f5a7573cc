"""The warm start: each matrix at its own least squares, masks kept; taken back where the block does not gain."""

from __future__ import annotations

import pytest
import torch
from repair_samples import Sample, sample, weights_of
from torch import Tensor

from compressor.recipe import RecoveryRecipe
from compressor.recovery.warm_start import warm_start

LAST = RecoveryRecipe(selection="last")


def inputs_of(given: Sample) -> dict[str, Tensor]:
    """What enters each matrix of the dense block, (tokens, in) in float64."""
    hidden = given.io.inputs.states.flatten(0, 1)
    normed = given.dense.norm(hidden)
    return {
        "up.weight": normed.double(),
        "down.weight": torch.nn.functional.gelu(given.dense.up(normed)).double(),
    }


def test_warm_start_equals_the_least_squares_of_each_row() -> None:
    """Each row's kept weights are lstsq's on its own columns, damped towards the dense ones (float32 sums: 1e-4)."""
    given = sample(windows=40)
    warm_start(given.block, given.masks, given.io, LAST)
    for name, X in inputs_of(given).items():
        W, V = given.dense.get_parameter(name).double(), given.block.get_parameter(name).double()
        damping = 0.01 * X.square().sum(0).mean()
        damped = torch.cat([X, damping.sqrt() * torch.eye(X.shape[1], dtype=X.dtype)])
        for row, mask in enumerate(given.masks[name]):
            best = torch.linalg.lstsq(damped[:, mask], damped @ W[row]).solution
            torch.testing.assert_close(V[row, mask], best, rtol=1e-4, atol=1e-4)
            assert not V[row, ~mask].any()


@pytest.mark.parametrize("selection", ["heldout", "last"])
def test_warm_start_lowers_the_held_out_loss(selection: str) -> None:
    """It tells the loss of the block as it came; the one of the block as it is now is lower."""
    given = sample(windows=40)

    def loss() -> float:
        output = given.block(given.io.heldout_inputs.states)
        return float((output - given.io.heldout_targets.states).square().mean())

    before = loss()
    recipe = RecoveryRecipe.model_validate({"selection": selection})
    assert warm_start(given.block, given.masks, given.io, recipe) == pytest.approx(before, rel=1e-6)
    assert loss() < 0.9 * before


def test_warm_start_is_taken_back_where_it_does_not_help() -> None:
    """Held-out windows whose wanted output is what the pruned block gives: the weights come back."""
    given = sample()
    before = weights_of(given.block)
    given.io.heldout_targets.states.copy_(given.block(given.io.heldout_inputs.states))
    warm_start(given.block, given.masks, given.io, RecoveryRecipe())
    assert all(torch.equal(given.block.get_parameter(name), weight) for name, weight in before.items())
    warm_start(given.block, given.masks, given.io, LAST)
    assert not torch.equal(given.block.up.weight, before["up.weight"])


def test_warm_start_repeats_bit_for_bit_and_forgets_the_pruners_weights() -> None:
    """The kept weights come from mask and inputs alone, whatever the pruner has left there."""
    runs = []
    for factor in (1.0, 1.0, 3.0):
        given = sample()
        with torch.no_grad():
            given.block.up.weight.mul_(factor)
        warm_start(given.block, given.masks, given.io, LAST)
        runs.append(weights_of(given.block))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])
