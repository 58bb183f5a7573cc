"""What pruners share that look at a matrix' inputs: the checks, and what happens where there were none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar, cast

from torch import Tensor

from compressor.pruning.magnitude import magnitude_mask
from compressor.pruning.pruner import Pruned, check_pattern, check_weight, without
from compressor.recipe import PruningRecipe
from compressor.sparsity import SparsityPattern
from compressor.statistics import Statistic

NO_TOKENS = "saw no calibration token; pruned by magnitude"

Kind = TypeVar("Kind", bound=Statistic)


class CalibratedPruner(ABC, Generic[Kind]):
    """A pruner that asks for a statistic of the inputs.

    Attributes:
        statistic: Which one, ``Kind``.
    """

    statistic: type[Statistic] | None

    def prune(
        self,
        W: Tensor,
        statistic: Statistic | None,
        pattern: SparsityPattern,
        recipe: PruningRecipe,
        *,
        name: str = "weight",
    ) -> Pruned:
        """The pruned copy of ``W`` (out, in); by magnitude for an expert that no token was routed to.

        Raises:
            InputRefused: NaN or infinity in weights or inputs; inputs that the pattern does not divide; what
                :meth:`prune_calibrated` refuses.
        """
        assert self.statistic is not None
        assert isinstance(statistic, self.statistic)
        check_pattern(name, W.shape[1], pattern)
        check_weight(name, W)
        statistic.check_finite(name)
        W = W.detach().float()
        if statistic.tokens == 0:
            mask = magnitude_mask(W, pattern)
            return Pruned(mask, without(W, mask), NO_TOKENS)
        return self.prune_calibrated(W, cast(Kind, statistic), pattern, recipe, name)

    @abstractmethod
    def prune_calibrated(
        self, W: Tensor, statistic: Kind, pattern: SparsityPattern, recipe: PruningRecipe, name: str
    ) -> Pruned:
        """The pruned copy of ``W`` (out, in) float32, finite, after at least one token."""
