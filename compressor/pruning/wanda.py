"""Wanda: weights times the length of their inputs (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from compressor.pruning.magnitude import magnitude_mask
from compressor.pruning.pruner import Pruned, check_pattern, check_weight, lowest, lowest_in_groups, without
from compressor.recipe import PruningRecipe
from compressor.sparsity import Mask, SparsityPattern, pruned_count
from compressor.statistics import ColumnNorms, Statistic

NO_TOKENS = "saw no calibration token; pruned by magnitude"


class Wanda:
    """Prunes by |W_ij| * ||X_j||: compared within each output row, or within each group of a row for N:M."""

    statistic: type[Statistic] | None = ColumnNorms

    def prune(
        self,
        W: Tensor,
        statistic: Statistic | None,
        pattern: SparsityPattern,
        recipe: PruningRecipe,
        *,
        name: str = "weight",
    ) -> Pruned:
        """The pruned copy of ``W`` (out, in); floor(in * s) zeros in each row, or m - n in each group."""
        assert isinstance(statistic, ColumnNorms)
        check_pattern(name, W.shape[1], pattern)
        check_weight(name, W)
        statistic.check_finite(name)
        W = W.detach().float()
        if statistic.tokens == 0:
            mask = magnitude_mask(W, pattern)
            return Pruned(mask, without(W, mask), NO_TOKENS)
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
