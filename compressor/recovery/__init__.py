"""The recoveries, one line each: recipe name to the function that repairs a block, ``None`` for none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import nn

from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.recovery.ebft import repair
from compressor.sparsity import Mask

__all__ = ["RECOVERIES", "BlockIO", "BlockRecovery", "Repaired"]


class BlockRecovery(Protocol):
    """Tunes a block in place with its masks frozen; see :func:`compressor.recovery.ebft.repair`."""

    def __call__(
        self,
        block: nn.Module,
        masks: Mapping[str, Mask],
        io: BlockIO,
        recipe: RecoveryRecipe,
        *,
        lr: float,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Repaired: ...


RECOVERIES: dict[str, BlockRecovery | None] = {
    "ebft": repair,
    "none": None,
}
