"""Scales of a quantised matrix: round to nearest, each group's step chosen by what its error does to the outputs.

Notation: W (N, K) float32; q integers up to ``largest``; a group is a row's columns that share a scale s. For a group
with inputs X_g the outputs change by X_g e, e = q s - w, so that its squared error over the calibration tokens is
e · H_g · e with H_g = X_gᵀ X_g. Of the steps α · max|w| / largest, α in ``SHRINKS``, each group takes the one with the
least error: a smaller step rounds most weights more finely and cuts off the largest. Zeros stay zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.statistics import Statistic

__all__ = ["PIECE", "PieceGram", "Rounded", "group_size_of", "round_to_nearest", "search_scales"]

PIECE = 64  # columns whose inner products are kept; the format's groups are multiples
SHRINKS = tuple(1.0 - 0.05 * step for step in range(11))  # 1.0 to 0.5
_GROUP_SIZES = {8: 0, 4: PIECE}


@dataclass(frozen=True)
class Rounded:
    """A matrix as multiples of its scales: ``values`` (N, K) float32 dequantised, ``scales`` (N, G) float32."""

    values: Tensor
    scales: Tensor


class PieceGram(Statistic):
    """Inner products of the input columns within each piece of 64: X_gᵀ X_g, (pieces, 64, 64)."""

    @staticmethod
    def shape(in_features: int) -> tuple[int, ...]:
        """``(pieces, 64, 64)``."""
        return (-(-in_features // PIECE), PIECE, PIECE)

    @staticmethod
    def of(X: Tensor) -> Tensor:
        """X_gᵀ X_g of each piece; columns that fill up the last one are zero."""
        pieces = _in_groups(X, PIECE).transpose(0, 1)  # (pieces, tokens, 64)
        return pieces.mT @ pieces

    def gram(self) -> Tensor:
        """(pieces, 64, 64) float32; the statistic's own storage, do not write to it."""
        return self._sum


def group_size_of(bits: int) -> int:
    """Columns that share a scale: whole rows (0) for 8 bits, 64 for 4."""
    return _GROUP_SIZES[bits]


def round_to_nearest(W: Tensor, bits: int, group_size: int) -> Rounded:
    """W with steps that reach each group's largest magnitude."""
    groups = _in_groups(W, group_size or W.shape[1])
    return _rounded(groups, _steps(groups, bits), W, bits)


def search_scales(W: Tensor, bits: int, group_size: int, statistic: PieceGram) -> Rounded:
    """W with the steps that change its outputs least on the calibration inputs; inner products beyond 64 columns, in a
    longer group, are left out of the error.

    Args:
        W: (N, K) float32.
        bits: 8 or 4.
        group_size: A multiple of 64, or 0.
        statistic: Of the inputs; without tokens the steps are those of ``round_to_nearest``.
    """
    size = group_size or W.shape[1]
    groups = _in_groups(W, size)
    reaching = _steps(groups, bits)
    if not statistic.tokens:
        return _rounded(groups, reaching, W, bits)
    best, least = reaching, torch.full_like(reaching, torch.inf)
    for shrink in SHRINKS:
        steps = reaching * shrink
        difference = _rounded(groups, steps, W, bits).values - W
        errors = _group_errors(difference, statistic.gram(), size)
        better = errors < least
        best, least = torch.where(better, steps, best), torch.where(better, errors, least)
    return _rounded(groups, best, W, bits)


def _in_groups(W: Tensor, size: int) -> Tensor:
    """(N, K) as (N, groups, size), the last group filled up with zeros."""
    lacking = -W.shape[1] % size
    return torch.nn.functional.pad(W, (0, lacking)).view(len(W), -1, size)


def _largest(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


def _steps(groups: Tensor, bits: int) -> Tensor:
    """(N, G): steps that reach the largest magnitude; 1 for a group of zeros, or of numbers too small to divide by."""
    steps = groups.abs().amax(dim=-1) / _largest(bits)
    return torch.where(steps < torch.finfo(torch.float32).tiny, 1.0, steps)


def _rounded(groups: Tensor, steps: Tensor, W: Tensor, bits: int) -> Rounded:
    largest = _largest(bits)
    q = (groups / steps[..., None]).round().clamp(-largest, largest)
    values = (q * steps[..., None]).view(len(W), -1)[:, : W.shape[1]]
    return Rounded(values.contiguous(), steps)


def _group_errors(difference: Tensor, gram: Tensor, size: int) -> Tensor:
    """e · H_g · e of each group, (N, G)."""
    pieces = _in_groups(difference, PIECE).transpose(0, 1)  # (pieces, N, 64)
    errors = ((pieces @ gram) * pieces).sum(dim=-1).T  # (N, pieces)
    per_group = -(-size // PIECE)
    return _in_groups(errors, per_group).sum(dim=-1)
