"""Magnitude pruning: the smallest weights go (Han et al., arXiv 1506.02626); needs no calibration."""

from __future__ import annotations

from torch import Tensor

from compressor.pruning.pruner import Pruned, check_pattern, check_weight, lowest, lowest_in_groups, without
from compressor.recipe import PruningRecipe
from compressor.sparsity import Mask, SparsityPattern, pruned_count
from compressor.statistics import Statistic


class Magnitude:
    """Prunes by |W|: one threshold per matrix, or per group for N:M."""

    statistic: type[Statistic] | None = None

    def prune(
        self,
        W: Tensor,
        statistic: Statistic | None,
        pattern: SparsityPattern,
        recipe: PruningRecipe,
        *,
        name: str = "weight",
    ) -> Pruned:
        """The pruned copy of ``W`` (out, in); floor(out * in * s) zeros, or m - n in each group."""
        check_pattern(name, W.shape[1], pattern)
        check_weight(name, W)
        W = W.detach().float()
        mask = magnitude_mask(W, pattern)
        return Pruned(mask, without(W, mask))


def magnitude_mask(W: Tensor, pattern: SparsityPattern) -> Mask:
    """Keeps the largest |W_ij| of the whole matrix, or of each group; (out, in)."""
    S = W.abs()
    if pattern.is_n_m:
        return ~lowest_in_groups(S, pattern)
    return ~lowest(S.reshape(1, -1), pruned_count(S.numel(), pattern.sparsity)).view(S.shape)
