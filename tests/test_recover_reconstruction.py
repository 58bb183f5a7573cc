"""The reconstruction loss: which tokens count and how much, in training and on held-out windows alike."""

from __future__ import annotations

import pytest
import torch
from repair_samples import Sample, sample
from torch import Tensor

from compressor.recipe import RecoveryRecipe
from compressor.recovery.ebft import repair
from compressor.recovery.reconstruction import ReconstructionLoss
from compressor.streams import Activations

WAYS = ("keep", "exclude", "per_token")
LOSSES = ("mse", "normalized")


def loss_of(given: Sample, **settings: object) -> ReconstructionLoss:
    """The loss of a recipe for the sample's training windows."""
    return ReconstructionLoss.of(RecoveryRecipe.model_validate(settings), given.io.targets)


def massive() -> Sample:
    """A sample whose first tokens have wanted outputs a hundred times the others'."""
    given = sample()
    for store in (given.io.targets, given.io.heldout_targets):
        store.states[:, 0] *= 100.0
    return given


def written_out(output: Tensor, target: Tensor, first_token: str, power: float) -> float:
    """The loss without scale, token by token, in float64."""
    total = []
    for window_output, window_target in zip(output.double(), target.double(), strict=True):
        for place, (o, t) in enumerate(zip(window_output, window_target, strict=True)):
            if first_token == "exclude" and place == 0:
                continue
            gain = power / float(t.square().mean()) if first_token == "per_token" else 1.0
            total.append(gain * float((o - t).square().mean()))
    return sum(total) / len(total)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("way", WAYS)
def test_loss_equals_a_loop_over_tokens(way: str, kind: str) -> None:
    """Training and held-out loss are the mean over the tokens that count, each with its weight."""
    given = massive()
    loss = loss_of(given, loss=kind, first_token=way)
    targets = given.io.targets.states
    power = float(targets[:, 1 if way == "exclude" else 0 :].double().square().mean())
    output, target = given.block(given.io.inputs.states[:5]), targets[:5]
    scale = 1 / power if kind == "normalized" else 1.0
    expected = scale * written_out(output, target, way, power)
    assert float(loss.training(output, target)) == pytest.approx(expected, rel=1e-5)
    heldout = given.block(given.io.heldout_inputs.states)
    expected = written_out(heldout, given.io.heldout_targets.states, way, power)
    assert loss.heldout(given.block, given.io, 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_target_power_is_the_loss_of_nothing(way: str) -> None:
    """The relative loss of a block that answers 0 is 1."""
    given = massive()
    loss = loss_of(given, first_token=way)
    silent = lambda module, hidden: torch.zeros_like(hidden)  # noqa: E731  # shorter than a function
    object.__setattr__(given.io, "forward", silent)
    power = loss.target_power(given.io.heldout_targets)
    assert loss.heldout(given.block, given.io, 3) == pytest.approx(power, rel=1e-6)


def test_per_token_counts_every_token_alike() -> None:
    """The same relative error costs the same at a massive token as at any other; plainly it costs 10^4 as much."""
    given = massive()
    target = given.io.targets.states[:1]
    costs = {}
    for way in ("keep", "per_token"):
        loss = loss_of(given, first_token=way)
        spoilt = [target.clone() for _ in range(2)]
        for place, output in enumerate(spoilt):
            output[:, place] *= 1.1
        costs[way] = float(loss.training(spoilt[0], target)) / float(loss.training(spoilt[1], target))
    assert costs["per_token"] == pytest.approx(1.0, rel=1e-4)
    assert costs["keep"] > 1000


def test_per_token_survives_tokens_that_are_zero() -> None:
    """A token whose wanted output is 0 weighs at most a thousand times the mean one, and nothing is NaN."""
    target = torch.ones(1, 3, 4)
    target[0, 1] = 0.0
    loss = ReconstructionLoss.of(RecoveryRecipe(first_token="per_token"), Activations.filled(target))
    assert float(loss.training(target + 1e-3, target)) == pytest.approx(1 / 3, rel=1e-4)
    nothing = ReconstructionLoss.of(RecoveryRecipe(first_token="per_token"), Activations.filled(0 * target))
    assert float(nothing.training(target, 0 * target)) == 0.0


@pytest.mark.parametrize("way", WAYS)
def test_repair_trains_and_selects_by_the_same_tokens(way: str) -> None:
    """A repair lowers the loss that it was asked to, and tells its held-out value."""
    given = sample()
    recipe = RecoveryRecipe.model_validate({"epochs": 8, "batch_size": 4, "first_token": way})
    loss = ReconstructionLoss.of(recipe, given.io.targets)
    before = loss.heldout(given.block, given.io, 4)
    result = repair(given.block, given.masks, given.io, recipe, lr=1e-2, seed=0)
    assert result.loss_before == pytest.approx(before, rel=1e-6)
    assert result.loss_after == pytest.approx(loss.heldout(given.block, given.io, 4), rel=1e-5)
    assert result.loss_after < 0.7 * result.loss_before
