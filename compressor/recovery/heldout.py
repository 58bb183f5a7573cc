"""The best weights that a repair has seen, by the loss of held-out windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
