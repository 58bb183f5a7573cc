"""The learning-rate probe: finds what an exhaustive search finds, with fewer trials, and leaves no trace."""

from __future__ import annotations

import torch
from repair_samples import sample, weights_of

from compressor.recipe import RecoveryRecipe
from compressor.recovery.ebft import repair
from compressor.recovery.lr_probe import LearningRateProbe

CANDIDATES = (1e-4, 1e-3, 1e-2, 1e-1, 10.0)


def recipe(**settings: object) -> RecoveryRecipe:
    """A short repair with a probe of two epochs on two blocks."""
    probe = {"candidates": CANDIDATES, "epochs": 2, "blocks": 2}
    return RecoveryRecipe.model_validate({"epochs": 2, "batch_size": 4, "probe": probe, **settings})


def test_probe_finds_the_best_of_all_candidates() -> None:
    """The climb from the middle ends at the rate with the lowest held-out loss of an exhaustive search."""
    losses = {}
    for lr in CANDIDATES:
        given = sample()
        losses[lr] = repair(
            given.block, given.masks, given.io, recipe(selection="last"), lr=lr, seed=0
        ).loss_after
    given = sample()
    chosen = LearningRateProbe(recipe()).lr_for(0, given.block, given.masks, given.io, seed=0)
    assert chosen.lr == min(losses, key=losses.__getitem__)
    assert len(chosen.tried) < len(CANDIDATES)
    assert len(chosen.ratios) == len(chosen.tried)
    assert chosen.ratios[chosen.tried.index(chosen.lr)] == min(chosen.ratios)


def test_probe_restores_the_block_bit_for_bit() -> None:
    """After the trials every parameter is what it was."""
    given = sample()
    before = weights_of(given.block)
    LearningRateProbe(recipe()).lr_for(0, given.block, given.masks, given.io, seed=0)
    assert all(torch.equal(given.block.get_parameter(name), weight) for name, weight in before.items())


def test_probe_settles_after_its_blocks() -> None:
    """Two blocks are probed, the third one takes the settled rate without trials."""
    probe = LearningRateProbe(recipe())
    for index in range(2):
        given = sample()
        assert probe.lr_for(index, given.block, given.masks, given.io, seed=index).tried
    settled = probe.lr_for(2, given.block, given.masks, given.io, seed=2)
    assert settled.tried == ()
    assert settled.lr == probe.lr
    assert probe.lr in probe.tried


def test_probe_repeats_itself() -> None:
    """The same block and seed give the same trials."""
    results = []
    for _ in range(2):
        given = sample()
        results.append(LearningRateProbe(recipe()).lr_for(0, given.block, given.masks, given.io, seed=0))
    assert results[0] == results[1]


def test_a_given_rate_is_taken_without_trials() -> None:
    """A number in the recipe settles the matter."""
    given = sample()
    probe = LearningRateProbe(recipe(lr=3e-5))
    chosen = probe.lr_for(0, given.block, given.masks, given.io, seed=0)
    assert (chosen.lr, chosen.tried, probe.tried) == (3e-5, (), ())


def test_a_diverged_trial_loses() -> None:
    """A rate whose loss overflows scores infinite and is never chosen, even when the climb starts there."""
    given = sample()
    wild = recipe(probe={"candidates": (1e-3, 1e30, 1e32), "epochs": 2, "blocks": 1})
    chosen = LearningRateProbe(wild).lr_for(0, given.block, given.masks, given.io, seed=0)
    assert chosen.lr == 1e-3
    assert chosen.tried == (1e-3, 1e30, 1e32)
    assert chosen.ratios[1:] == (float("inf"), float("inf"))


def test_blocks_are_weighed_together() -> None:
    """The settled rate has the lowest product of ratios over the blocks that were probed."""
    probe = LearningRateProbe(recipe())
    first, second = sample(), sample(windows=8, seqlen=3)
    one = probe.lr_for(0, first.block, first.masks, first.io, seed=0)
    two = probe.lr_for(1, second.block, second.masks, second.io, seed=1)
    both = {
        lr: a * two.ratios[two.tried.index(lr)]
        for lr, a in zip(one.tried, one.ratios, strict=True)
        if lr in two.tried
    }
    assert two.lr == min(both, key=both.__getitem__)
