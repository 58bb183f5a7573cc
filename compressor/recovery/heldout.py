"""Held-out loss of a block, and the best weights seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressor.errors import InputRefused
from compressor.recovery.block_io import BlockIO
from compressor.recovery.precision import autocast
from compressor.streams import Activations, in_order, prefetched


def step_0(block: nn.Module, io: BlockIO, batch_size: int) -> tuple[float, float]:
    """Held-out loss of the block as it is, and the mean square of the held-out targets.

    Raises:
        InputRefused: E-CALIBRATION-SHORT: no windows to train on or to select by; E-LOSS-NONFINITE: one of the
            two is NaN or infinite.
    """
    counts = len(io.inputs), len(io.heldout_inputs)
    if 0 in counts:
        raise InputRefused(
            "E-CALIBRATION-SHORT",
            f"repair needs windows to train on and to select by; got {counts[0]} and {counts[1]}",
            "give more calibration text, or a shorter --seqlen",
        )
    loss, power = heldout_loss(block, io, batch_size), mean_square(io.heldout_targets)
    if not math.isfinite(loss) or not math.isfinite(power):
        raise InputRefused(
            "E-LOSS-NONFINITE",
            f"the output of {io.name} is NaN or infinite before its repair has begun",
            "compute in float32 with --device cpu, or check the calibration text and the model's weights",
        )
    return loss, power


def heldout_loss(block: nn.Module, io: BlockIO, batch_size: int) -> float:
    """Mean squared error of the block over all held-out windows, tokens and channels; sums in float64."""
    total = torch.zeros((), dtype=torch.float64, device=io.device)
    batches = in_order(len(io.heldout_inputs), batch_size)
    with torch.no_grad():
        for hidden, target in prefetched([io.heldout_inputs, io.heldout_targets], batches):
            with autocast(io):
                output = io.forward(block, hidden)
            total += (output.float() - target).square().sum(dtype=torch.float64)
    return float(total) / io.heldout_targets.states.numel()


def mean_square(activations: Activations) -> float:
    """Mean square over all windows, tokens and channels; sums in float64."""
    total = sum(float(window.float().square().sum(dtype=torch.float64)) for window in activations.states)
    return total / activations.states.numel()


class BestWeights:
    """The weights with the lowest held-out loss so far, copied; at first as they are (step 0)."""

    def __init__(self, weights: Sequence[Tensor], loss: float) -> None:
        self._weights = weights
        self._copies = [weight.detach().clone() for weight in weights]
        self.loss = loss
        self.step = 0

    def offer(self, loss: float, step: int) -> bool:
        """Keep the present weights if ``loss`` is lower than any before; says whether. NaN never is."""
        if not loss < self.loss:
            return False
        self.loss, self.step = loss, step
        self._copy(self._weights, self._copies)
        return True

    def restore(self) -> None:
        """Set the weights back to the best ones."""
        self._copy(self._copies, self._weights)

    @staticmethod
    @torch.no_grad()
    def _copy(source: Sequence[Tensor], destination: Sequence[Tensor]) -> None:
        for from_, to in zip(source, destination, strict=True):
            to.copy_(from_)
