"""What becomes zero: patterns, masks, counts. Tensors only.

Notation: ``W`` is a weight matrix (out, in); a mask has its weight's shape, dtype bool, and ``True`` means kept.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import UsageError

Mask = Tensor  # bool, the weight's shape, True = kept


@dataclass(frozen=True)
class SparsityPattern:
    """Unstructured sparsity, or N:M (at most ``n`` kept of each ``m`` consecutive inputs).

    Attributes:
        sparsity: Share of zeros, in (0, 1); for N:M it is ``1 - n/m``.
        n: Weights kept in each group, or ``None`` for unstructured.
        m: Group length along the inputs, or ``None`` for unstructured.
    """

    sparsity: float
    n: int | None = None
    m: int | None = None

    @classmethod
    def unstructured(cls, sparsity: float) -> SparsityPattern:
        """A share of zeros with no structure.

        Raises:
            UsageError: ``sparsity`` is not a number in (0, 1).
        """
        if not (isinstance(sparsity, (int, float)) and math.isfinite(sparsity) and 0 < sparsity < 1):
            raise UsageError(
                "E-SPARSITY-RANGE",
                f"sparsity must be between 0 and 1, both excluded; got {sparsity}",
                "give a share such as --sparsity 0.5 for 50 %",
            )
        return cls(sparsity=float(sparsity))

    @classmethod
    def n_m(cls, n: int, m: int) -> SparsityPattern:
        """At most ``n`` kept of each ``m`` consecutive inputs.

        Raises:
            UsageError: Not 0 < n < m.
        """
        if not 0 < n < m:
            raise UsageError(
                "E-PATTERN-RANGE",
                f"N:M needs 0 < N < M; got {n}:{m}",
                "give N weights kept of M, such as --pattern 2:4",
            )
        return cls(sparsity=1 - n / m, n=n, m=m)

    @classmethod
    def parse(cls, text: str) -> SparsityPattern:
        """The pattern that ``"2:4"`` (N kept of M) stands for.

        Raises:
            UsageError: The text is not ``N:M`` with 0 < N < M.
        """
        match = re.fullmatch(r"\s*(\d{1,6}):(\d{1,6})\s*", text)
        if match is None:
            raise UsageError(
                "E-PATTERN-SYNTAX",
                f"a pattern is N:M, two whole numbers; got {text!r}",
                "give a pattern such as --pattern 2:4",
            )
        return cls.n_m(int(match[1]), int(match[2]))

    @property
    def is_n_m(self) -> bool:
        """Whether the zeros are bound to groups."""
        return self.n is not None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.is_n_m else f"{self.sparsity:g}"


def pruned_count(numel: int, sparsity: float) -> int:
    """How many of ``numel`` weights become zero: floor(numel * sparsity), exact for decimal shares such as 0.7.

    0.7 * 10 is 7 and not 6.999…: the product is rounded at 1e-9 relative before the floor.
    """
    product = numel * sparsity
    nearest = round(product)
    return nearest if abs(product - nearest) <= 1e-9 * max(1.0, product) else math.floor(product)


def count_zeros(weight: Tensor) -> int:
    """Number of zero elements (negative zero counts as zero)."""
    return int(weight.numel() - torch.count_nonzero(weight).item())


def holds_n_m(mask: Mask, n: int, m: int) -> bool:
    """Whether each group of ``m`` consecutive inputs keeps at most ``n``. ``mask``: (out, in), in divisible by m."""
    if mask.shape[-1] % m:
        return False
    return bool((mask.reshape(*mask.shape[:-1], -1, m).sum(-1) <= n).all())
