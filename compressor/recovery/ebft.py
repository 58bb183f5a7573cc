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
from collections.abc import Callable, Mapping

from torch import nn

from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.recovery.frozen_masks import FrozenMasks
from compressor.recovery.heldout import BestWeights
from compressor.recovery.precision import deterministic
from compressor.recovery.reconstruction import reconstruction_task, step_0
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
        recipe: Epochs, batch size, optimiser, schedule, loss and selection.
        lr: Peak learning rate.
        seed: Of the order of the windows; same seed and device, same weights bit for bit.
        progress: Called after each step with (steps made, steps in all).

    Raises:
        InputRefused: No windows to train on or to select by; a loss that is NaN or infinite before step 1.
        ReportedError: A masked weight moved (a fault of the program).
    """
    started = time.perf_counter()
    frozen = FrozenMasks(block, masks)
    frozen.zero_weights()
    loss, before, power = step_0(block, io, recipe)
    weights = trained_weights(block)
    best = BestWeights(weights, before)
    with trainable(weights), deterministic(io.device):
        task = reconstruction_task(block, weights, io, recipe, loss, frozen.zero_gradients)
        course = train(task, recipe, best, lr=lr, seed=seed, progress=progress)
    keep_best = recipe.selection == "heldout" or course.diverged
    if keep_best:
        best.restore()
    frozen.verify()
    return Repaired(
        loss_before=before,
        loss_after=best.loss if keep_best else course.heldout,
        target_power=power,
        train_loss_first=course.train[0] if course.train else None,
        train_loss_last=course.train[-1] if course.train else None,
        best_step=best.step if keep_best else course.steps,
        steps=course.steps,
        lr=lr,
        diverged=course.diverged,
        elapsed_s=time.perf_counter() - started,
        trained_parameters=sum(weight.numel() for weight in weights) - frozen.zeros,
    )


def trained_weights(block: nn.Module) -> list[nn.Parameter]:
    """Every floating parameter of the block but the routers': linears, experts, biases, norm gains."""
    return [
        weight
        for name, weight in block.named_parameters()
        if weight.is_floating_point() and not set(name.split(".")[:-1]) & ROUTERS
    ]
