"""The sparsity that each block bears, where it is not the same for all; outliers are counted in the dense model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compressor.linears import IgnoreRules, PrunableMatrix, observe_inputs, prunable_matrices
from compressor.models.source import BlockSource
from compressor.progress import Progress, StageStarted
from compressor.pruning.allocation import linear, outlier_ratio, owl
from compressor.ranks import ALONE, Ranks
from compressor.recipe import PruningRecipe
from compressor.sparsity import SparsityPattern
from compressor.statistics import BlockStatistics, ColumnNorms
from compressor.survey import survey

__all__ = ["block_patterns"]


def block_patterns(
    source: BlockSource,
    recipe: PruningRecipe,
    pattern: SparsityPattern,
    ignore: IgnoreRules,
    ids: Tensor,
    device: torch.device,
    *,
    stop: Callable[[], bool],
    progress: Progress,
    ranks: Ranks = ALONE,
) -> tuple[SparsityPattern, ...]:
    """The pattern of each block; their mean, weighted by prunable weights, is ``pattern``'s sparsity.

    Args:
        source: The dense blocks.
        recipe: Its ``allocation``, and the section of that name.
        pattern: Of the whole model, unstructured unless the allocation is uniform.
        ignore: Which matrices stay dense; a block where all do has no share to bear.
        ids: Calibration windows (N, T), for ``owl``.
        device: Where blocks compute.
        stop: Asked between blocks of a survey.
        progress: Receives events.
        ranks: Who shares the windows.

    Raises:
        UsageError: E-ALLOCATION-RANGE: a block's share would not lie between 0 and 1.
        InputRefused: E-STATISTIC-NONFINITE.
        StoppedSafely: ``stop`` said so.
    """
    if recipe.allocation == "uniform":
        return (pattern,) * source.num_blocks

    def matrices_of(index: int) -> list[PrunableMatrix]:
        return prunable_matrices(source.block_structure(index), f"{source.blocks_name}.{index}", ignore)

    weights = [
        sum(matrix.of(source.block_structure(index)).numel() for matrix in matrices_of(index))
        for index in range(source.num_blocks)
    ]
    bearing = [index for index, count in enumerate(weights) if count]
    counted = [weights[index] for index in bearing]
    if recipe.allocation == "linear":
        shares = linear(len(bearing), pattern.sparsity, recipe.linear.slope, counted)
    else:
        progress(StageStarted("survey", f"{source.num_blocks} dense blocks, outliers for owl"))

        def examine(index: int, block: nn.Module, send: Callable[[], object]) -> float:
            name = f"{source.blocks_name}.{index}"
            return _outliers(block, name, matrices_of(index), send, recipe.owl.m, device, ranks)

        ratios = survey(source, ids, device, examine, stop=stop, ranks=ranks)
        shares = owl([ratios[index] for index in bearing], pattern.sparsity, recipe.owl.lmbda, counted)
    share_of = dict(zip(bearing, shares, strict=True))
    return tuple(
        SparsityPattern.unstructured(share_of.get(index, pattern.sparsity))
        for index in range(source.num_blocks)
    )


def _outliers(
    block: nn.Module,
    name: str,
    matrices: list[PrunableMatrix],
    send: Callable[[], object],
    m: float,
    device: torch.device,
    ranks: Ranks,
) -> float:
    """Percentage of outliers among a dense block's Wanda scores, after all windows have gone through it; 0 for none."""
    widths = {matrix.name: matrix.of(block).shape[1] for matrix in matrices}
    statistics = BlockStatistics(ColumnNorms, widths, device)
    with observe_inputs(block, matrices, statistics.receive):
        send()
    statistics.finish(ranks)
    pairs = []
    for matrix in matrices:
        statistic = statistics[matrix.name]
        statistic.check_finite(f"{name}.{matrix.name}")
        assert isinstance(statistic, ColumnNorms)
        pairs.append((matrix.of(block), statistic.norms))
    return outlier_ratio(pairs, m) if pairs else 0.0
