"""The contract of a pruner, and what pruners share: choosing the lowest scores, checking inputs.

Notation: ``W`` is a weight matrix (out, in), ``S`` its scores of the same shape; a mask is bool, ``True`` = kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.pruning.group_ranks import LONGEST, lowest_of_groups
from compressor.recipe import PruningRecipe
from compressor.sparsity import Mask, SparsityPattern
from compressor.statistics import Statistic


@dataclass(frozen=True)
class Pruned:
    """A matrix after pruning.

    Attributes:
        mask: (out, in) bool, ``True`` = kept.
        weight: (out, in) float32, exactly +0.0 where the mask is ``False``.
        note: Something that the user should know, or ``None``; the caller adds the matrix' name.
    """

    mask: Mask
    weight: Tensor
    note: str | None = None


class Pruner(Protocol):
    """Decides which weights of one matrix become zero.

    Attributes:
        statistic: What it needs to know of the inputs, or ``None`` when the weights are enough.
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
        """The pruned copy of ``W`` (out, in), float32; ``W`` itself is not changed.

        Raises:
            InputRefused: NaN or infinity in weights or statistic; inputs that the pattern does not divide.
        """
        ...


def check_pattern(name: str, in_features: int, pattern: SparsityPattern) -> None:
    """Do nothing when ``pattern`` fits a matrix of this input width.

    Raises:
        InputRefused: N:M, and M does not divide ``in_features``.
    """
    if pattern.m is not None and in_features % pattern.m:
        raise InputRefused(
            "E-PATTERN-DIVIDES",
            f"{pattern} needs in_features divisible by {pattern.m}, got {in_features} ({name})",
            f"exclude it with --ignore {name.removesuffix('.weight')}, or choose another pattern",
        )


def check_weight(name: str, W: Tensor) -> None:
    """Do nothing when every weight is finite.

    Raises:
        InputRefused: NaN or infinity in ``W``.
    """
    if not bool(torch.isfinite(W).all()):
        raise InputRefused(
            "E-WEIGHT-NONFINITE",
            f"{name} holds NaN or infinity",
            "the checkpoint is damaged; fetch it again, or repair the weight",
        )


def without(W: Tensor, mask: Mask) -> Tensor:
    """``W`` with +0.0 where the mask is ``False`` (a product would leave -0.0 behind)."""
    return W.masked_fill(~mask, 0.0)


def lowest(S: Tensor, count: int) -> Tensor:
    """Where the ``count`` lowest scores of each row are, (rows, columns) bool; of equal ones the first.

    Exactly ``count`` per row. It is a stable sort's choice, in linear time: by the count-th lowest value and
    a running count of its ties.
    """
    if count <= 0:
        return torch.zeros_like(S, dtype=torch.bool)
    if S.shape[-1] <= 64:  # many short rows: sorting beats selecting
        chosen = torch.zeros_like(S, dtype=torch.bool)
        return chosen.scatter_(-1, S.argsort(dim=-1, stable=True)[..., :count], True)
    threshold = S.kthvalue(count, dim=-1, keepdim=True).values
    below = threshold > S
    ties = threshold == S
    missing = count - below.sum(-1, keepdim=True)
    return below | (ties & (ties.cumsum(-1) <= missing))


def lowest_in_groups(S: Tensor, pattern: SparsityPattern) -> Tensor:
    """Where the m - n lowest of each group of m consecutive inputs are, (out, in) bool. ``S``: (out, in)."""
    assert pattern.n is not None
    assert pattern.m is not None
    if pattern.m <= LONGEST:
        return lowest_of_groups(S, pattern.m, pattern.m - pattern.n)
    return lowest(S.reshape(-1, pattern.m), pattern.m - pattern.n).view(S.shape)
