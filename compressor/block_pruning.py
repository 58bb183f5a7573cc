"""How the blocks of one pass are pruned: matrix by matrix with masks, or by taking heads and neurons out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from compressor.block_sparsity import block_patterns
from compressor.linears import IgnoreRules, PrunableMatrix
from compressor.models.source import BlockSource
from compressor.progress import Notice, Progress, StageStarted
from compressor.pruning import PRUNERS
from compressor.pruning.pruner import Pruned
from compressor.ranks import ALONE, Ranks
from compressor.recipe import PruningRecipe, Recipe
from compressor.sparsity import Mask, SparsityPattern
from compressor.statistics import BlockStatistics
from compressor.structured import Anatomy, StructuredPlan, find_anatomy, plan_removal, prune_units

__all__ = ["BlockPruning", "MaskPruning", "PrunedBlock", "UnitPruning", "prepare_pruning"]


@dataclass(frozen=True)
class PrunedBlock:
    """What pruning did to one block.

    Attributes:
        masks: By parameter, True = kept; none where units were taken out.
        notes: What the user should know, one line per matrix.
    """

    masks: dict[str, Mask]
    notes: tuple[str, ...] = ()


class BlockPruning(Protocol):
    """Prunes the blocks of one model, first to last."""

    def pattern(self, index: int) -> SparsityPattern:
        """The zeros that block ``index`` is to have."""
        ...

    def new_statistics(self, block: nn.Module, matrices: Sequence[PrunableMatrix]) -> BlockStatistics | None:
        """What has to be known of a block's inputs on the sparse path; ``None`` for nothing."""
        ...

    def prune(
        self,
        index: int,
        block: nn.Module,
        matrices: Sequence[PrunableMatrix],
        statistics: BlockStatistics | None,
    ) -> PrunedBlock:
        """Prune the dense ``block`` in place."""
        ...


def prepare_pruning(
    source: BlockSource,
    recipe: Recipe,
    pattern: SparsityPattern,
    ignore: IgnoreRules,
    ids: Tensor,
    device: torch.device,
    *,
    stop: Callable[[], bool],
    progress: Progress,
    anatomy: Anatomy | None = None,
    ranks: Ranks = ALONE,
) -> BlockPruning:
    """The pruning that a recipe asks for, with a survey of the dense model where it is shared out over blocks.

    Args:
        source: The dense blocks.
        recipe: Its section ``pruning`` counts.
        pattern: The sparsity of the whole model.
        ignore: Which matrices stay dense.
        ids: Calibration windows (N, T).
        device: Where blocks compute.
        stop: Asked between blocks of a survey.
        progress: Receives events.
        anatomy: The model's heads and neurons, where they have been looked for already.
        ranks: Who shares the windows.

    Raises:
        StoppedSafely: ``stop`` said so.
        ReportedError: The target cannot be met in this way; statistics are not finite.
    """
    pruning = recipe.pruning
    if pruning.method == "flap":
        anatomy = anatomy or find_anatomy(source, ignore, pattern.sparsity, uniform=pruning.flap.uniform)
        progress(StageStarted("survey", f"{source.num_blocks} dense blocks, inputs of heads and neurons"))
        plan = plan_removal(
            source, ids, device, anatomy, pruning.flap, pattern.sparsity, stop=stop, ranks=ranks
        )
        return UnitPruning(plan, pattern)
    patterns = block_patterns(
        source, pruning, pattern, ignore, ids, device, stop=stop, progress=progress, ranks=ranks
    )
    return MaskPruning(source.blocks_name, pruning, patterns, device, progress)


class MaskPruning:
    """Each matrix by itself, in the way of the recipe's pruner.

    Args:
        blocks_name: Path of the blocks' list, for messages.
        recipe: Pruner and its settings.
        patterns: Of each block.
        device: Where statistics are summed.
        progress: Receives notices.
    """

    def __init__(
        self,
        blocks_name: str,
        recipe: PruningRecipe,
        patterns: Sequence[SparsityPattern],
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._blocks_name, self._recipe, self._patterns = blocks_name, recipe, patterns
        self._device, self._progress = device, progress
        self._pruner = PRUNERS[recipe.method]

    def pattern(self, index: int) -> SparsityPattern:
        """The zeros that block ``index`` is to have."""
        return self._patterns[index]

    def new_statistics(self, block: nn.Module, matrices: Sequence[PrunableMatrix]) -> BlockStatistics | None:
        """Empty statistics of the pruner's kind; ``None`` where it looks at weights alone."""
        kind = self._pruner.statistic
        if kind is None:
            return None
        return BlockStatistics(
            kind, {matrix.name: matrix.of(block).shape[1] for matrix in matrices}, self._device
        )

    def prune(
        self,
        index: int,
        block: nn.Module,
        matrices: Sequence[PrunableMatrix],
        statistics: BlockStatistics | None,
    ) -> PrunedBlock:
        """Masks by parameter, and the pruner's notes; the block's weights become the pruner's."""
        parameters = dict(block.named_parameters())
        masks: dict[str, Mask] = {}
        notes = []
        for matrix in matrices:
            name = f"{self._blocks_name}.{index}.{matrix.name}"
            statistic = statistics[matrix.name] if statistics is not None else None
            pruned: Pruned = self._pruner.prune(
                matrix.of(block), statistic, self._patterns[index], self._recipe, name=name
            )
            mask = masks.setdefault(
                matrix.parameter, torch.ones_like(parameters[matrix.parameter], dtype=torch.bool)
            )
            matrix.of_mask(mask).copy_(pruned.mask)
            with torch.no_grad():
                matrix.of(block).copy_(pruned.weight)
            if pruned.note:
                self._progress(Notice(f"{name}: {pruned.note}"))
                notes.append(f"block {index}, {matrix.name}: {pruned.note}")
        return PrunedBlock(masks, tuple(notes))


class UnitPruning:
    """Heads and neurons taken out by a plan that was made over all blocks.

    Args:
        plan: What each block loses.
        pattern: The share that is asked for.
    """

    def __init__(self, plan: StructuredPlan, pattern: SparsityPattern) -> None:
        self._plan, self._pattern = plan, pattern

    def pattern(self, index: int) -> SparsityPattern:
        """The share of the whole model; what is left has no zeros to keep."""
        return self._pattern

    def new_statistics(self, block: nn.Module, matrices: Sequence[PrunableMatrix]) -> None:
        """Nothing: the survey has seen it all."""

    def prune(
        self,
        index: int,
        block: nn.Module,
        matrices: Sequence[PrunableMatrix],
        statistics: BlockStatistics | None,
    ) -> PrunedBlock:
        """Take the block's share out."""
        prune_units(block, self._plan.cuts[index])
        return PrunedBlock({})
