"""Mask tuning: equal to a plain loop over scores; as many kept everywhere; weights are the dense ones; never worse."""

from __future__ import annotations

import math

import pytest
import torch
from repair_samples import Sample, sample, weights_of
from torch import Tensor

from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import Repaired
from compressor.recovery.ebft_mask import ScoredWeight, repair, start_scores
from compressor.recovery.lr_probe import rate_of
from compressor.recovery.schedule import learning_rate_factor
from compressor.sparsity import Mask, SparsityPattern, holds_n_m
from compressor.streams import shuffled

TWO_OF_FOUR = SparsityPattern.n_m(2, 4)


def recipe(**settings: object) -> RecoveryRecipe:
    """A short repair."""
    return RecoveryRecipe.model_validate({"method": "ebft-mask", "epochs": 6, "batch_size": 5, **settings})


def run(given: Sample, lr: float = 0.1, seed: int = 0, **settings: object) -> Repaired:
    """The sample's block repaired."""
    return repair(given.block, given.masks, given.io, recipe(**settings), lr=lr, seed=seed)


def highest(S: Tensor, mask: Mask, width: int) -> Mask:
    """The highest scores of each stretch of `width`, as many as `mask` keeps there; one stretch at a time."""
    chosen = torch.zeros_like(mask).view(-1, width)
    for place, (scores, kept) in enumerate(zip(S.view(-1, width), mask.view(-1, width), strict=True)):
        order = scores.argsort(descending=True, stable=True)
        chosen[place, order[: int(kept.sum())]] = True
    return chosen.view(mask.shape)


def plain_training(given: Sample, lr: float, chosen: RecoveryRecipe) -> dict[str, Mask]:
    """Mask tuning as in a textbook: gradients of the masked weights, times the weights, into unfused AdamW."""
    dense = {name: given.dense.get_parameter(name) for name in given.masks}
    S = {name: start_scores(dense[name], mask).requires_grad_() for name, mask in given.masks.items()}
    optimizer = torch.optim.AdamW(S.values(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    generator, done = torch.Generator().manual_seed(0), 0
    steps = chosen.epochs * math.ceil(len(given.io.inputs) / chosen.batch_size)
    width = given.io.pattern.m if given.io.pattern else None

    def masks() -> dict[str, Mask]:
        return {n: highest(s.detach(), given.masks[n], width or s.shape[1]) for n, s in S.items()}

    for _ in range(chosen.epochs):
        for rows in shuffled(len(given.io.inputs), chosen.batch_size, generator):
            used = {name: (dense[name] * mask).requires_grad_() for name, mask in masks().items()}
            output = torch.func.functional_call(given.block, used, (given.io.inputs.states[rows],))
            (output - given.io.targets.states[rows]).square().mean().backward()
            for name, scores in S.items():
                gradient = used[name].grad
                assert gradient is not None
                scores.grad = gradient * dense[name]
            torch.nn.utils.clip_grad_norm_(S.values(), 1.0)
            optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(done, steps, "cosine", 0.05)
            optimizer.step()
            done += 1
    return masks()


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR])
def test_mask_tuning_equals_a_plain_loop(pattern: SparsityPattern | None) -> None:
    """Eighteen steps end at the masks of the textbook loop."""
    expected = plain_training(sample(pattern=pattern), 0.1, recipe())
    given = sample(pattern=pattern)
    masks = run(given, selection="last").masks
    assert masks is not None
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    assert any(not torch.equal(masks[name], mask) for name, mask in given.masks.items())


@pytest.mark.parametrize("selection", ["heldout", "last"])
@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR])
def test_mask_tuning_keeps_counts_and_dense_weights(pattern: SparsityPattern | None, selection: str) -> None:
    """Each row or group keeps as many weights as before, bit for bit the dense ones; all else is as it was."""
    given = sample(pattern=pattern)
    before = weights_of(given.block)
    masks = run(given, selection=selection).masks
    assert masks is not None
    for name, mask in masks.items():
        assert torch.equal(mask.sum(1), given.masks[name].sum(1))
        assert pattern is None or holds_n_m(mask, 2, 4)
        dense = given.dense.get_parameter(name)
        assert torch.equal(given.block.get_parameter(name), dense.masked_fill(~mask, 0.0))
    for name in before.keys() - masks.keys():
        assert torch.equal(given.block.get_parameter(name), before[name])


def test_mask_tuning_lowers_the_held_out_loss() -> None:
    """What is told is what the block now gives, and a good part less than before."""
    given = sample()
    result = run(given, epochs=20)
    output = given.block(given.io.heldout_inputs.states)
    now = float((output - given.io.heldout_targets.states).square().mean())
    assert result.loss_after == pytest.approx(now, rel=1e-5)
    assert result.loss_after < 0.8 * result.loss_before


def test_mask_tuning_falls_back_to_the_block_as_it_came() -> None:
    """Where no trained mask beats the pruner's weights, they come back, though they are not the dense ones."""
    given = sample()
    with torch.no_grad():
        given.block.up.weight.mul_(1.01)
    before = weights_of(given.block)
    given.io.heldout_targets.states.copy_(given.block(given.io.heldout_inputs.states))
    result = run(given)
    assert result.best_step == 0
    assert result.loss_after == result.loss_before == 0
    assert result.masks is not None
    assert all(torch.equal(result.masks[name], mask) for name, mask in given.masks.items())
    assert all(torch.equal(given.block.get_parameter(name), weight) for name, weight in before.items())


def test_mask_tuning_repeats_bit_for_bit() -> None:
    """The same seed gives the same masks, another seed others."""
    runs = []
    for seed in (0, 0, 1):
        given = sample()
        runs.append(run(given, seed=seed, selection="last").masks or {})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_mask_tuning_leaves_no_gradient_in_the_block() -> None:
    """Only scores are trained; the block's weights hold no gradient."""
    given = sample()
    run(given)
    assert all(weight.grad is None and not weight.requires_grad for weight in given.block.parameters())


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mask_tuning_works_in_mixed_precision(amp: torch.dtype) -> None:
    """The loss falls in half precision too, with the loss scale of float16."""
    result = run(sample(amp=amp), epochs=20)
    assert result.loss_after < 0.9 * result.loss_before


@pytest.mark.parametrize("transposed", [False, True])
def test_scores_start_at_the_masks_choice(transposed: bool) -> None:
    """The first choice is the pruner's mask, also of experts and of matrices that are stored (in, out)."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(3, 8, 12, generator=generator)
    mask = torch.rand(dense.shape, generator=generator) > 0.6
    scored = ScoredWeight(dense, mask, None, transposed)
    assert torch.equal(scored.mask(), mask)
    scored.scores.requires_grad_(True)
    assert torch.equal(scored.weight(), dense * mask)
    scored.weight().sum().backward()  # type: ignore[no-untyped-call]
    assert scored.scores.grad is not None
    assert torch.equal(scored.scores.grad, dense)
    with torch.no_grad():
        scored.scores.normal_(generator=generator)
    inputs = 1 if transposed else 2
    assert torch.equal(scored.mask().sum(inputs), mask.sum(inputs))


def test_scores_are_trained_at_the_published_rate_unless_told() -> None:
    """`lr: auto` stands for the section's rate, without trials; a number is taken."""
    assert rate_of(recipe()) == 2e-2
    assert rate_of(recipe(ebft_mask={"lr": 0.1})) == 0.1
    assert rate_of(recipe(lr=0.3)) == 0.3
    assert rate_of(RecoveryRecipe()) == "auto"
