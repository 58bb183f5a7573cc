"""The lowest scores of each short group, by ranks: every two scores of a group are compared, nothing is sorted.

A score's rank is the number of those that a stable sort would put before it: for i < j one comparison S_i <= S_j
adds one to the rank of j, or else to the rank of i. Scores are finite.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LONGEST = 32  # scores per group; beyond, the comparisons of all pairs cost more than sorting
_CHUNK = 1 << 18  # scores ranked at a time: they and their ranks stay in the processor's second-level cache
_GATHERED = 1 << 25  # scores gathered at a time on other devices
_MASK_ROWS = 32  # a chunk is compared flat, and masked as equal rows with one row of mask


def lowest_of_groups(S: Tensor, m: int, count: int) -> Tensor:
    """Where the ``count`` lowest of each group of ``m`` neighbours are, bool, of ``S``'s shape; of equals the first.

    Args:
        S: (..., columns), a multiple of ``m`` columns.
        m: Scores per group, at most ``LONGEST``.
        count: How many of each group, 0 to ``m``.
    """
    S = S.detach().to(torch.promote_types(S.dtype, torch.float32))  # NumPy has no bfloat16
    if S.device.type == "cpu":
        return torch.from_numpy(_lowest_flat(S.reshape(-1).numpy(), m, count)).view(S.shape)
    groups = torch.split(S.reshape(-1, m), max(1, _GATHERED // (m * m)))
    return torch.cat([lowest_of_planes(part.T, count).T.bool() for part in groups]).view(S.shape)


def lowest_of_planes(P: Tensor, count: int) -> Tensor:
    """One where the ``count`` lowest of each column of ``P`` (m, columns) are, else zero; of equals the first.

    A few operations whatever m is: the pairs' rows gathered, compared, and summed to ranks by a product with
    the pairs' incidence matrix, whose sums of at most m ones are exact in every floating type. In ``P``'s type,
    since PyTorch compares into bool, and multiplies by it, one element at a time on the CPU.
    """
    before, after, incidence, start = _pairs(len(P), P.dtype, P.device)
    first = P.index_select(0, before)
    holds = torch.le(first, P.index_select(0, after), out=first)  # (pairs, columns) of 0 and 1
    return torch.addmm(start, incidence, holds).lt_(count)


@lru_cache(maxsize=8)
def _pairs(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both places of each pair i < j, (pairs,); what S_i <= S_j adds to the ranks, (m, pairs); ranks at first."""
    before, after = torch.triu_indices(m, m, 1, device=device).unbind()
    pair = torch.arange(len(before), device=device)
    incidence = torch.zeros(m, len(pair), dtype=dtype, device=device)
    incidence[after, pair] = 1
    incidence[before, pair] = -1
    return before, after, incidence, torch.arange(m - 1, -1, -1, dtype=dtype, device=device)[:, None]


def _lowest_flat(F: NDArray[np.float32], m: int, count: int) -> NDArray[np.bool_]:
    """:func:`lowest_of_groups` of a flat array.

    All scores are compared with those d places later, for d from 1 to m - 1; what reaches into the next group is
    masked out. NumPy, since PyTorch compares floating numbers on the CPU one at a time.
    """
    chosen = np.empty(len(F), dtype=np.bool_)
    chunks = max(1, math.ceil(len(F) / _CHUNK))
    width = math.ceil(len(F) / (chunks * _MASK_ROWS * m)) * m
    place = np.tile(np.arange(m, dtype=np.uint8), width // m)
    within = [(place < m - d).view(np.uint8) for d in range(m)]  # the partner is of the same group
    holds = np.zeros(_MASK_ROWS * width, dtype=np.bool_)
    ones = holds.view(np.uint8)
    ranks = np.empty_like(ones)
    rows = ones.reshape(_MASK_ROWS, width)  # a view
    for start in range(0, len(F), len(ones)):
        S = F[start : start + len(ones)]
        ranks.reshape(rows.shape)[:] = m - 1 - place
        for d in range(1, m):
            np.less_equal(S[:-d], S[d:], out=holds[: len(S) - d])
            rows &= within[d]
            ranks -= ones
            np.add(ranks[d:], ones[:-d], out=ranks[d:])
        np.less(ranks[: len(S)], count, out=chosen[start : start + len(S)])
    return chosen
