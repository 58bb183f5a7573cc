"""What an end-to-end method trains: the blocks' own weights, or something small beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from compressor.finetuning.sparse_model import SparseModel
from compressor.recovery.ebft import trained_weights
from compressor.recovery.frozen_masks import FrozenMasks


class Parametrisation(Protocol):
    """Trained leaves, and the blocks as they answer with them."""

    @property
    def weights(self) -> Sequence[nn.Parameter]:
        """The trained leaves, float32."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """What runs in the place of the model's blocks."""

    @property
    def count(self) -> int:
        """How many numbers are free to move; masked weights are not."""

    def train(self, mode: bool) -> None:
        """Dropout on or off."""

    def zero_gradients(self) -> None:
        """Set the gradients of masked weights to 0."""

    def merge(self) -> None:
        """Put what was learned into the blocks' weights."""


class OwnWeights:
    """Weights of the blocks themselves, with their masks frozen.

    Args:
        model: Its blocks are trained in place.
        choose: The trained parameters of a block; routers are never among them.
    """

    def __init__(
        self, model: SparseModel, choose: Callable[[nn.Module], list[nn.Parameter]] = trained_weights
    ) -> None:
        self.blocks: Sequence[nn.Module] = model.blocks
        self.weights: Sequence[nn.Parameter] = [weight for block in model.blocks for weight in choose(block)]
        together = model.together()
        self._frozen = FrozenMasks(together, model.all_masks())
        trained = set(self.weights)
        masked = sum(
            int((~mask).sum())
            for name, mask in model.all_masks().items()
            if together.get_parameter(name) in trained
        )
        self.count = sum(weight.numel() for weight in self.weights) - masked

    def train(self, mode: bool) -> None:
        """Nothing: the blocks stay in eval mode, as the dense model is."""

    def zero_gradients(self) -> None:
        """Set the gradients of masked weights to 0."""
        self._frozen.zero_gradients()

    def merge(self) -> None:
        """Nothing: the blocks hold what was learned."""
