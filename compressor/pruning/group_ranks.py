"""The lowest scores of each short group, by ranks: every two scores of a group are compared, nothing is sorted.

A score's rank is the number of those that a stable sort would put before it: for i < j one comparison S_i <= S_j
adds one to the rank of j, or else to the rank of i. Scores are finite.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LONGEST = 32  # scores per group; beyond, the comparisons of all pairs cost more than sorting
_WORD = 8  # bytes, one for the rank of each of so many scores
_CHUNK = 1 << 18  # scores ranked at a time on the CPU, so that their ranks stay in its cache
_ROWS = 32  # into so many equal rows a chunk is cut, for one row of mask
_GATHERED = 1 << 25  # scores gathered in pairs at a time on other devices


def lowest_of_groups(S: Tensor, m: int, count: int) -> Tensor:
    """Where the ``count`` lowest of each group of ``m`` neighbours are, bool, of ``S``'s shape; of equals the first.

    Args:
        S: (..., columns), a multiple of ``m`` columns.
        m: Scores per group, at most ``LONGEST``.
        count: How many of each group, 0 to ``m``.
    """
    S = S.detach().to(torch.promote_types(S.dtype, torch.float32))  # NumPy has no bfloat16
    if S.device.type == "cpu":
        in_words = _WORD % m == 0 and sys.byteorder == "little"
        chosen = (_lowest_in_words if in_words else _lowest_in_bytes)(S.reshape(-1).numpy(), m, count)
        return torch.from_numpy(chosen).view(S.shape)
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


def _lowest_in_bytes(F: NDArray[np.floating], m: int, count: int) -> NDArray[np.bool_]:
    """:func:`lowest_of_groups` of a flat array: all scores are compared with those d places later, d = 1 ... m - 1.

    What holds between two groups is masked out. NumPy, since PyTorch compares floating numbers on the CPU one at a
    time.
    """
    chosen = np.empty(len(F), dtype=np.bool_)
    chunks = max(1, math.ceil(len(F) / _CHUNK))
    width = math.ceil(len(F) / (chunks * _ROWS * m)) * m
    place = np.tile(np.arange(m, dtype=np.uint8), width // m)
    holds = np.empty(_ROWS * width, dtype=np.bool_)
    ones, ranks = holds.view(np.uint8), np.empty(_ROWS * width, dtype=np.uint8)
    rows = ones.reshape(_ROWS, width)  # a view
    for start in range(0, len(F), len(ones)):
        S = F[start : start + len(ones)]
        ranks.reshape(rows.shape)[:] = m - 1 - place
        for d in range(1, m):
            np.less_equal(S[:-d], S[d:], out=holds[: len(S) - d])
            rows &= (place < m - d).view(np.uint8)
            ranks -= ones
            np.add(ranks[d:], ones[:-d], out=ranks[d:])
        np.less(ranks[: len(S)], count, out=chosen[start : start + len(S)])
    return chosen


def _lowest_in_words(F: NDArray[np.floating], m: int, count: int) -> NDArray[np.bool_]:
    """:func:`_lowest_in_bytes` for groups that fill words of eight bytes, with a third less to do.

    In the word that holds a group's results, byte i says whether S_i <= S_(i + d). It is taken from byte i of the
    ranks and added to byte i + d, both by one product with 2^(8 d) - 1.
    """
    at_first, steps = _word_steps(m)
    chosen = np.empty(len(F), dtype=np.bool_)
    chunks = max(1, math.ceil(len(F) / _CHUNK))
    words = math.ceil(len(F) / (chunks * _WORD))
    held = np.empty(words, dtype=np.uint64)
    ranks = np.empty(words, dtype=np.uint64)
    holds, rank_of = held.view(np.bool_), ranks.view(np.uint8)  # views, one byte per score
    for start in range(0, len(F), words * _WORD):
        S = F[start : start + words * _WORD]
        ranks[:] = at_first
        for d, (within, factor) in enumerate(steps, 1):
            np.less_equal(S[:-d], S[d:], out=holds[: len(S) - d])
            held &= within
            held *= factor
            ranks += held
        np.less(rank_of[: len(S)], count, out=chosen[start : start + len(S)])
    return chosen


@lru_cache(maxsize=8)
def _word_steps(m: int) -> tuple[np.uint64, list[tuple[np.uint64, np.uint64]]]:
    """The ranks at first, m - 1 down to 0 in each group; the mask and the factor of each distance d."""
    places = [i % m for i in range(_WORD)]

    def word(values: list[int]) -> np.uint64:
        return np.uint64(int.from_bytes(bytes(values), "little"))

    steps = [(word([int(i < m - d) for i in places]), np.uint64((1 << 8 * d) - 1)) for d in range(1, m)]
    return word([m - 1 - i for i in places]), steps
