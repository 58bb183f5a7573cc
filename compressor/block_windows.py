"""Which blocks are repaired together, and in which order.

``block`` and ``split`` repair each block by itself. ``overlap`` is the cross-block repair of Shin et al., "Rethinking
Pruning Large Language Models", arXiv 2406.15524: windows of two blocks, one block apart, and the two ends alone,

    (0)  (0 1)  (1 2)  ...  (L-2 L-1)  (L-1)

so that each block is tuned twice, each time for half of the epochs, and the second time with the one behind it, whose
output the dense model's is compared with. A block is pruned when the first window reaches it and is finished when the
last one leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compressor.block_pruning import PrunedBlock
from compressor.calibration_states import States
from compressor.linears import PrunableMatrix
from compressor.models.source import BlockSource
from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.sparsity import Mask


@dataclass(frozen=True)
class BlockWindow:
    """Consecutive blocks that are repaired together.

    Attributes:
        blocks: Their indices.
        finished: Those of them that no later window repairs.
        is_last_of: Whether no later window ends with the same block.
    """

    blocks: tuple[int, ...]
    finished: tuple[int, ...]
    is_last_of: bool = True


def windows_of(num_blocks: int, *, overlap: bool) -> list[BlockWindow]:
    """The windows over the blocks of a model, in the order of their repair."""
    if not overlap or num_blocks == 1:
        return [BlockWindow((index,), (index,)) for index in range(num_blocks)]
    last = num_blocks - 1
    pairs = [BlockWindow((index - 1, index), (index - 1,), index != last) for index in range(1, num_blocks)]
    return [BlockWindow((0,), ()), *pairs, BlockWindow((last,), (last,))]


def training_of_a_window(recipe: RecoveryRecipe, *, twice: bool) -> RecoveryRecipe:
    """How one window is trained so that every token passes each block ``recipe.epochs`` times, rounded up to even.

    Args:
        recipe: Of all.
        twice: Whether two windows hold each block.
    """
    return recipe.model_copy(update={"epochs": (recipe.epochs + 1) // 2}) if twice else recipe


@dataclass
class OpenBlock:
    """A block that is pruned and not finished yet.

    Attributes:
        index: Which one.
        block: Its present weights.
        matrices: What could be pruned of it.
        pruned: What pruning did to it.
        masks: By parameter; they move if the repair moves them.
        io: What its repair sees; ``None`` without one.
        came_as: Shapes of the parameters that hold matrices, before pruning.
        loss_before: Held-out loss before a warm start; ``None`` without one.
        repaired: The repairs so far of windows that end with it.
    """

    index: int
    block: nn.Module
    matrices: Sequence[PrunableMatrix]
    pruned: PrunedBlock
    masks: dict[str, Mask]
    io: BlockIO | None
    came_as: Mapping[str, torch.Size]
    loss_before: float | None = None
    repaired: Repaired | None = None
    pruning_s: float = 0.0
    recovery_s: float = 0.0
    elapsed_s: float = 0.0

    def add(self, repaired: Repaired) -> None:
        """Note one more repair: losses from the first to the last, steps of all."""
        if repaired.masks is not None:
            self.masks = {**self.masks, **repaired.masks}
        if self.repaired is not None:
            repaired = replace(
                repaired,
                loss_before=self.repaired.loss_before,
                best_step=self.repaired.best_step + repaired.best_step,
                steps=self.repaired.steps + repaired.steps,
                diverged=self.repaired.diverged or repaired.diverged,
                elapsed_s=self.repaired.elapsed_s + repaired.elapsed_s,
            )
        elif self.loss_before is not None:
            repaired = replace(repaired, loss_before=self.loss_before)
        self.repaired = repaired


def joined(
    blocks: Sequence[OpenBlock], entering: States, source: BlockSource
) -> tuple[nn.Module, dict[str, Mask], BlockIO]:
    """The blocks of one window as one: a module, its masks, and what its repair sees.

    Args:
        blocks: Consecutive, with what the repair of each one sees.
        entering: States before the first of them.
        source: Runs each in its place.
    """
    last = blocks[-1]
    assert last.io is not None
    io = replace(last.io, inputs=entering.training, heldout_inputs=entering.heldout)
    if len(blocks) == 1:
        return last.block, last.masks, io
    indices = [one.index for one in blocks]

    def forward(module: nn.Module, hidden: Tensor) -> Tensor:
        for index, block in zip(indices, module.children(), strict=True):
            hidden = source.forward(index, block, hidden)
        return hidden

    masks = {f"{place}.{name}": mask for place, one in enumerate(blocks) for name, mask in one.masks.items()}
    name = " and ".join(one.io.name for one in blocks if one.io is not None)
    io = replace(io, forward=forward, name=name, matrices=(), load_dense=None, dense_inputs=None)
    return nn.ModuleList([one.block for one in blocks]), masks, replace(io, heldout_dense_inputs=None)
