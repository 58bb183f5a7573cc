"""EBFT: the kept weights of one block, tuned until the sparse block answers like the dense one.

Source: Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", arXiv 2402.12419, equation 3:

    min_W  mean( (f(X; M * W) - Y)^2 ),   M frozen

``X`` (B, T, D) are hidden states that came through the blocks already made sparse; ``Y`` is what the dense
block makes of the same ``X`` (the paper), or what the dense model has at this place (arXiv 2406.15524,
"global propagation"). Deviations, with their measured effect in docs/benchmarks.md: the weights kept are
those of the best held-out step, step 0 included; gradients are clipped in true units; the learning rate is
chosen by trial (lr_probe).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.recovery.frozen_masks import FrozenMasks
from compressor.recovery.halves import halves
from compressor.recovery.heldout import BestWeights
from compressor.recovery.precision import deterministic
from compressor.recovery.reconstruction import ReconstructionLoss, reconstruction_task, step_0
from compressor.recovery.training import train, trainable
from compressor.sparsity import Mask

# Modules that choose experts are left alone: their choice is discrete, so a block's loss gives them no way.
ROUTERS = {"gate", "router"}


def repair(
    block: nn.Module,
    masks: Mapping[str, Mask],
    io: BlockIO,
    recipe: RecoveryRecipe,
    *,
    lr: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Repaired:
    """Tunes ``block`` in place (float32) with its masks frozen; says what it brought.

    Args:
        block: On ``io.device``. Masked weights are set to 0 first, whatever they hold.
        masks: Parameter path in the block -> bool mask of the parameter's shape, ``True`` = kept.
        io: Training and held-out windows.
        recipe: Epochs, batch size, optimiser, schedule, loss, window and selection.
        lr: Peak learning rate.
        seed: Of the order of the windows; same seed and device, same weights bit for bit.
        progress: Called after each step with (steps made, steps in all).

    Raises:
        InputRefused: No windows to train on or to select by; a loss that is NaN or infinite before step 1; halves
            are asked for, and the block has none.
        ReportedError: A masked weight moved (a fault of the program).
    """
    started = time.perf_counter()
    frozen = FrozenMasks(block, masks)
    frozen.zero_weights()
    loss, before, power = step_0(block, io, recipe)
    weights = trained_weights(block)
    if recipe.window == "split":
        tuned = _tune_halves(block, io, weights, frozen, before, recipe, lr=lr, seed=seed, progress=progress)
    else:
        start = BestWeights(weights, before)
        tuned = _tune(block, io, start, weights, frozen, loss, recipe, lr=lr, seed=seed, progress=progress)
    frozen.verify()
    return Repaired(
        loss_before=before,
        loss_after=tuned.loss,
        target_power=power,
        train_loss_first=tuned.train[0] if tuned.train else None,
        train_loss_last=tuned.train[-1] if tuned.train else None,
        best_step=tuned.best_step,
        steps=tuned.steps,
        lr=lr,
        diverged=tuned.diverged,
        elapsed_s=time.perf_counter() - started,
        trained_parameters=sum(weight.numel() for weight in weights) - frozen.zeros,
    )


@dataclass(frozen=True)
class _Tuned:
    """What one training gave: held-out loss and step of the weights kept, training losses by epoch, steps."""

    loss: float
    best_step: int
    train: Sequence[float]
    steps: int
    diverged: bool


def _tune(
    block: nn.Module,
    io: BlockIO,
    best: BestWeights,
    weights: Sequence[nn.Parameter],
    frozen: FrozenMasks,
    loss: ReconstructionLoss,
    recipe: RecoveryRecipe,
    *,
    lr: float,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> _Tuned:
    """Trains ``weights`` and leaves the chosen ones in the block."""
    with trainable(weights), deterministic(io.device):
        task = reconstruction_task(block, weights, io, recipe, loss, frozen.zero_gradients)
        course = train(task, recipe, best, lr=lr, seed=seed, progress=progress)
    if recipe.selection == "last" and not course.diverged:
        return _Tuned(course.heldout, course.steps, course.train, course.steps, False)
    best.restore()
    return _Tuned(best.loss, best.step, course.train, course.steps, course.diverged)


def _tune_halves(
    block: nn.Module,
    io: BlockIO,
    weights: Sequence[nn.Parameter],
    frozen: FrozenMasks,
    before: float,
    recipe: RecoveryRecipe,
    *,
    lr: float,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> _Tuned:
    """Trains attention, then MLP; the losses told are the whole block's, so those of the second training.

    Each half keeps its best step. If both together are no better than the block as it came, it comes back.
    """
    origin = BestWeights(weights, before)
    done: list[_Tuned] = []

    def told(step: int, steps: int) -> None:
        if progress is not None:
            progress(len(done) * steps + step, 2 * steps)

    for half in halves(block, io, weights, io.at_once(recipe.batch_size)):
        loss, start, _ = step_0(block, half.io, recipe)
        best = BestWeights(half.weights, start)
        done.append(
            _tune(block, half.io, best, half.weights, frozen, loss, recipe, lr=lr, seed=seed, progress=told)
        )
    steps, diverged = sum(one.steps for one in done), any(one.diverged for one in done)
    kept = recipe.selection == "last" or done[-1].loss < before
    if not kept:
        origin.restore()
    return _Tuned(
        loss=done[-1].loss if kept else before,
        best_step=sum(one.best_step for one in done) if kept else 0,
        train=done[-1].train,
        steps=steps,
        diverged=diverged,
    )


def trained_weights(block: nn.Module) -> list[nn.Parameter]:
    """Every floating parameter of the block but the routers': linears, experts, biases, norm gains."""
    return [
        weight
        for name, weight in block.named_parameters()
        if weight.is_floating_point() and not set(name.split(".")[:-1]) & ROUTERS
    ]
