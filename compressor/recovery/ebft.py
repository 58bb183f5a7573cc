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
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.recovery.frozen_masks import FrozenMasks
from compressor.recovery.heldout import BestWeights, heldout_loss, mean_square, step_0
from compressor.recovery.precision import autocast, deterministic
from compressor.recovery.training import Batches, Task, train, trainable
from compressor.sparsity import Mask
from compressor.streams import prefetched

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
    before, power = step_0(block, io, recipe.batch_size)
    weights = trained_weights(block)
    best = BestWeights(weights, before)
    with trainable(weights), deterministic(io.device):
        course = train(
            _task(block, weights, frozen, io, recipe), recipe, best, lr=lr, seed=seed, progress=progress
        )
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
    )


def trained_weights(block: nn.Module) -> list[nn.Parameter]:
    """Every floating parameter of the block but the routers': linears, experts, biases, norm gains."""
    return [
        weight
        for name, weight in block.named_parameters()
        if weight.is_floating_point() and not set(name.split(".")[:-1]) & ROUTERS
    ]


def reconstruction_loss(output: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    """scale * mean((output - target)^2) over B * T * D, in float32."""
    return scale * torch.nn.functional.mse_loss(output.float(), target)


def _task(
    block: nn.Module, weights: list[nn.Parameter], frozen: FrozenMasks, io: BlockIO, recipe: RecoveryRecipe
) -> Task:
    """The block's repair, as the training loop sees it."""
    scale = loss_scale(recipe, io)

    def losses(batches: Batches) -> Iterator[Tensor]:
        for hidden, target in prefetched([io.inputs, io.targets], batches):
            with autocast(io):
                output = io.forward(block, hidden)
            yield reconstruction_loss(output, target, scale)

    return Task(
        weights=weights,
        windows=len(io.inputs),
        losses=losses,
        heldout=lambda: heldout_loss(block, io, recipe.batch_size),
        zero_gradients=frozen.zero_gradients,
        device=io.device,
        amp_dtype=io.amp_dtype,
        scale=scale,
    )


def loss_scale(recipe: RecoveryRecipe, io: BlockIO) -> float:
    """1, or 1 / mean(target^2) over the training windows for the normalised loss (arXiv 2310.06927)."""
    power = mean_square(io.targets) if recipe.loss == "normalized" else 1.0
    return 1.0 / power if power > 0 else 1.0
