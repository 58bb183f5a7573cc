"""Wanda: weights times the length of their inputs (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from compressor.pruning.calibrated import CalibratedPruner
from compressor.pruning.pruner import Pruned, lowest, lowest_in_groups, without
from compressor.recipe import PruningRecipe
from compressor.sparsity import Mask, SparsityPattern, pruned_count
from compressor.statistics import ColumnNorms, Statistic


class Wanda(CalibratedPruner[ColumnNorms]):
    """Prunes by |W_ij| * ||X_j||: compared within each output row, or within each group of a row for N:M."""

    statistic: type[Statistic] | None = ColumnNorms

    def prune_calibrated(
        self, W: Tensor, statistic: ColumnNorms, pattern: SparsityPattern, recipe: PruningRecipe, name: str
    ) -> Pruned:
        """The pruned copy of ``W`` (out, in); floor(in * s) zeros in each row, or m - n in each group."""
        mask = wanda_mask(W, statistic.norms.to(W.device), pattern)
        return Pruned(mask, without(W, mask))


def wanda_score(W: Tensor, norms: Tensor) -> Tensor:
    """S_ij = |W_ij| * ||X_j||_2 (section 3, equation 1); (out, in). ``norms``: (in,)."""
    return W.abs() * norms


def wanda_mask(W: Tensor, norms: Tensor, pattern: SparsityPattern) -> Mask:
    """Keeps the highest scores of each row, or of each group of a row; (out, in)."""
    S = wanda_score(W, norms)
    if pattern.is_n_m:
        return ~lowest_in_groups(S, pattern)
    return ~lowest(S, pruned_count(W.shape[1], pattern.sparsity))
