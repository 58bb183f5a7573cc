"""Zeros that stay: masked weights held at exactly 0 through training, and the proof that they did."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compressor.errors import ReportedError
from compressor.sparsity import Mask


class FrozenMasks:
    """The masks of one block during its repair.

    A masked weight starts at 0 and its gradient is zeroed before the gradient norm and the optimiser see it.
    Both moments of AdamW then stay 0, so do its update 0 / (0 + eps) and its decay 0 * lr * wd: the weight
    stays 0 bit for bit, without touching the weights in any step.

    Args:
        block: The block, on its device.
        masks: Parameter path in the block -> mask of the parameter's shape.
    """

    def __init__(self, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        parameters = dict(block.named_parameters())
        self._masked = [
            (name, parameters[name], mask.to(parameters[name].device)) for name, mask in masks.items()
        ]
        self._kept = {name: int(mask.sum()) for name, _, mask in self._masked}

    @property
    def zeros(self) -> int:
        """How many weights are masked."""
        return sum(mask.numel() - self._kept[name] for name, _, mask in self._masked)

    def zero_weights(self) -> None:
        """Set every masked weight to +0.0."""
        with torch.no_grad():
            for _, weight, mask in self._masked:
                weight.masked_fill_(~mask, 0.0)

    def zero_gradients(self) -> None:
        """Set the gradient of every masked weight to 0."""
        for _, weight, mask in self._masked:
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def verify(self) -> None:
        """Do nothing when every masked weight is +0.0 bit for bit and no mask has changed.

        Raises:
            ReportedError: One is not; a fault of the program.
        """
        for name, weight, mask in self._masked:
            outside = weight.detach()[~mask]
            moved = (
                int((outside.view(torch.int32) != 0).sum())
                if outside.dtype == torch.float32
                else int(outside.count_nonzero())
            )
            if moved or int(mask.sum()) != self._kept[name]:
                raise ReportedError(
                    "E-MASK-BROKEN",
                    f"{moved} masked weights of {name} are no longer 0 after the repair",
                    "this is a fault of the program; please report it with the recipe and the model's name",
                )
