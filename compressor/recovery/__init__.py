"""The recoveries, one line each: recipe name to the function that repairs a block, ``None`` for none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import nn

from compressor.recipe import RecoveryRecipe
from compressor.recovery import dsnot, ebft, ebft_mask
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.sparsity import Mask

__all__ = ["RECOVERIES", "BlockIO", "BlockRecovery", "Repaired"]


class BlockRecovery(Protocol):
    """Repairs a block in place; see :func:`compressor.recovery.ebft.repair`.

    Masks are frozen, unless the method's point is to move them: then the result holds the new ones.
    """

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
    "ebft": ebft.repair,
    "dsnot": dsnot.repair,
    "ebft-mask": ebft_mask.repair,
    "none": None,
}
