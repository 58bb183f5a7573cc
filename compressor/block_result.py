"""What the pass over the blocks has to tell: of each block, and of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from compressor.finetuning import Finetuned
from compressor.recovery.block_io import Repaired

__all__ = ["BlockResult", "PassResult"]


@dataclass(frozen=True)
class BlockResult:
    """One committed block.

    Attributes:
        index: Which one.
        repaired: How its repair went; None without one.
        notes: The pruner's, one per matrix.
        elapsed_s: Wall time of all.
        pruning_s: Of statistics and masks; 0 for a block that was pruned before.
        recovery_s: Of the repair, trials of learning rates included.
        target: The sparsity that the block was to have; ``None`` where it is the model's.
        shapes: By parameter, its shape before and after, where heads or neurons were taken out.
    """

    index: int
    repaired: Repaired | None
    notes: tuple[str, ...]
    elapsed_s: float
    pruning_s: float = 0.0
    recovery_s: float = 0.0
    target: float | None = None
    shapes: Mapping[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)


@dataclass(frozen=True)
class PassResult:
    """All blocks, the perplexities that came out of the same pass, and the learning rate that was used.

    ``finetuned`` has one entry for each end-to-end stage after the pass, ``halved`` one line for each time that the
    device's memory ran out.
    """

    blocks: tuple[BlockResult, ...]
    perplexities: dict[str, float]
    lr: float | None
    lr_tried: tuple[float, ...]
    finetuned: tuple[Finetuned, ...] = ()
    halved: tuple[str, ...] = ()

    @property
    def taken_out(self) -> float | None:
        """Share of the prunable weights that are gone, where heads or neurons were taken out."""
        sizes = [sizes for block in self.blocks for sizes in block.shapes.values()]
        if not sizes:
            return None
        return 1 - sum(after.numel() for _, after in sizes) / sum(before.numel() for before, _ in sizes)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the pruner had to say, one line per matrix, the end-to-end stages, and a device out of memory."""
        stages = tuple(tuned.note for tuned in self.finetuned if tuned.note)
        return (*(note for block in self.blocks for note in block.notes), *stages, *self.halved)
