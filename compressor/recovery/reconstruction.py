"""How far a block's output is from the wanted one, and the training of weights that brings it closer.

Notation: B windows, T tokens, D channels; o (B, T, D) is the block's output, t the wanted one. The loss is

    scale * mean over windows, tokens and channels of ( g * (o - t) )^2

``scale`` is 1 (mse), or 1 / power, power = mean(t^2) over the training windows (normalized: the form of
SquareHead, arXiv 2310.06927). ``first_token`` says what becomes of the few tokens whose activations are a
thousand times the others' (massive activations, arXiv 2402.17762; in most models the first one) and which
would otherwise be most of the loss:

    keep        g = 1, every token counts; as published
    exclude     g = 1, position 0 is left out of the loss and of power
    per_token   g^2 = power / mean_d(t^2) of the token itself: every token's relative error counts the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.errors import InputRefused
from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO
from compressor.recovery.precision import autocast
from compressor.recovery.training import Batches, Task, parts_of
from compressor.streams import Activations, dealt, in_order, prefetched

QUIETEST = 1e-6  # share of power; a token below it counts as if it were there, so that g is at most 1000


@dataclass(frozen=True)
class ReconstructionLoss:
    """The loss above, its settings fixed.

    Attributes:
        first_token: Which tokens count, and how much.
        power: Mean square of the training windows' wanted output, over the tokens that count.
        scale: What the training loss is multiplied by; held-out losses are told without it.
    """

    first_token: Literal["keep", "exclude", "per_token"] = "keep"
    power: float = 1.0
    scale: float = 1.0

    @classmethod
    def of(cls, recipe: RecoveryRecipe, targets: Activations) -> ReconstructionLoss:
        """The recipe's loss for these training windows."""
        if recipe.loss == "mse" and recipe.first_token != "per_token":
            return cls(recipe.first_token)  # power is not asked for
        power = mean_square(targets, first=int(recipe.first_token == "exclude"))
        scale = 1.0 / power if recipe.loss == "normalized" and power > 0 else 1.0
        return cls(recipe.first_token, power, scale)

    def training(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch, (B, T, D) each, in float32."""
        return self.scale * nn.functional.mse_loss(*self._counted(output, target))

    def heldout(self, block: nn.Module, io: BlockIO, batch_size: int) -> float:
        """The loss without ``scale`` over all held-out windows; sums in float64."""
        total, elements = torch.zeros((), dtype=torch.float64, device=io.device), 0
        batches = in_order(len(io.heldout_inputs), io.at_once(batch_size))
        with torch.no_grad():
            for hidden, target in prefetched([io.heldout_inputs, io.heldout_targets], batches):
                with autocast(io):
                    output = io.forward(block, hidden)
                output, target = self._counted(output, target)
                total += (output - target).square().sum(dtype=torch.float64)
                elements += target.numel()
        squares, counted = io.heldout_inputs.ranks.total(float(total), elements)
        return squares / counted

    def target_power(self, targets: Activations) -> float:
        """The loss without ``scale`` of an output that is 0 everywhere."""
        total, elements = 0.0, 0
        for window in targets.states:
            target = window[None].float()
            _, target = self._counted(target, target)
            total += float(target.square().sum(dtype=torch.float64))
            elements += target.numel()
        squares, counted = targets.ranks.total(total, elements)
        return squares / counted

    def _counted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both times g, in float32, without the tokens that do not count."""
        output = output.float()
        if self.first_token == "exclude":
            return output[:, 1:], target[:, 1:]
        if self.first_token == "per_token":
            own = target.square().mean(-1, keepdim=True).clamp_min(QUIETEST * self.power)  # (B, T, 1)
            g = (self.power / own.clamp_min(torch.finfo(own.dtype).tiny)).sqrt()
            return g * output, g * target
        return output, target


def step_0(block: nn.Module, io: BlockIO, recipe: RecoveryRecipe) -> tuple[ReconstructionLoss, float, float]:
    """The recipe's loss; what it is on held-out windows for the block as it is, and for an output of 0.

    Raises:
        InputRefused: E-CALIBRATION-SHORT: no windows to train on or to select by; E-LOSS-NONFINITE: one of the
            losses is NaN or infinite.
    """
    counts = io.inputs.total, io.heldout_inputs.total
    if 0 in counts:
        raise InputRefused(
            "E-CALIBRATION-SHORT",
            f"repair needs windows to train on and to select by; got {counts[0]} and {counts[1]}",
            "give more calibration text, or a shorter --seqlen",
        )
    loss = ReconstructionLoss.of(recipe, io.targets)
    before, power = loss.heldout(block, io, recipe.batch_size), loss.target_power(io.heldout_targets)
    if not math.isfinite(before) or not math.isfinite(power):
        raise InputRefused(
            "E-LOSS-NONFINITE",
            f"the output of {io.name} is NaN or infinite before its repair has begun",
            "compute in float32 with --device cpu, or check the calibration text and the model's weights",
        )
    return loss, before, power


def mean_square(activations: Activations, first: int = 0) -> float:
    """Mean square over all windows, tokens from position ``first`` on, and channels; sums in float64."""
    total = sum(
        float(window[first:].float().square().sum(dtype=torch.float64)) for window in activations.states
    )
    squares, elements = activations.ranks.total(total, activations.states[:, first:].numel())
    return squares / elements


def reconstruction_task(
    block: nn.Module,
    weights: Sequence[nn.Parameter],
    io: BlockIO,
    recipe: RecoveryRecipe,
    loss: ReconstructionLoss,
    zero_gradients: Callable[[], None] = lambda: None,
) -> Task:
    """What the training loop needs to tune ``weights``, on which the output of ``block`` depends.

    Args:
        block: Run by ``io.forward``.
        weights: The leaves that move.
        io: Training and held-out windows.
        recipe: Batch size.
        loss: What is minimised, and what held-out windows are judged by.
        zero_gradients: Called after each backward pass.
    """

    def losses(batches: Batches) -> Iterator[Tensor]:
        split = [(part, len(rows)) for rows in batches for part in parts_of(rows, io.micro_batch)]
        read = dealt([io.inputs, io.targets], [part for part, _ in split])
        for (_, batch), (own, (hidden, target)) in zip(split, read, strict=True):
            if not own:
                yield torch.zeros((), device=io.device)
                continue
            with autocast(io):
                output = io.forward(block, hidden)
            part = loss.training(output, target)
            yield part if len(own) == batch else part * (len(own) / batch)

    return Task(
        weights=weights,
        windows=io.inputs.total,
        losses=losses,
        heldout=lambda: loss.heldout(block, io, recipe.batch_size),
        zero_gradients=zero_gradients,
        device=io.device,
        amp_dtype=io.amp_dtype,
        scale=loss.scale,
        micro_batch=io.micro_batch,
        ranks=io.inputs.ranks,
    )
