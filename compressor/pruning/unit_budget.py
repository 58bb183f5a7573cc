"""How many units each block gives up: FLAP's ways of sharing a removal out over layers and modules.

Source: arXiv 2312.11983, section 3.3 and its published code. Four ways, named as there: the layers are uniform
(UL) or adaptive (AL), and so is the split between heads and neurons (UM: in proportion; AM: by score; MM: a
number of heads that is given). Adaptive shares come from one order of all units by score in which each counts
with its own number of weights (the paper has 512/3 neurons to a head, which is so for LLaMA's shapes only).

The budget is met to less than one neuron: a unit that would exceed it is passed over, and the next one that fits
goes instead. The last unit of every group stays, whatever its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import UsageError

__all__ = ["Allocation", "UnitPool", "share_out", "weakest", "weights_of"]

Allocation = Literal["AL-AM", "AL-MM", "UL-UM", "UL-MM"]


@dataclass(frozen=True)
class UnitPool:
    """The units of one group in one block, the lowest score first.

    Attributes:
        kind: ``heads`` or ``neurons``.
        scores: (units,) ascending, comparable between pools of a kind and across kinds.
        weights: Weights that go with one unit.
        heads: Query heads that go with one unit; 0 for neurons.
    """

    kind: Literal["heads", "neurons"]
    scores: Tensor
    weights: int
    heads: int = 0

    @property
    def removable(self) -> int:
        """How many units can go: all but one."""
        return len(self.scores) - 1


def share_out(
    pools: Sequence[UnitPool], budget: int, allocation: Allocation, *, heads: int = 0
) -> tuple[int, ...]:
    """How many of its lowest units each pool gives up, together at most ``budget`` weights.

    Args:
        pools: Of all blocks, first to last.
        budget: Weights to remove.
        allocation: The way.
        heads: Query heads that go over all layers together, for the two ways where that is given.

    Raises:
        UsageError: E-FLAP-HEADS: the heads alone have more weights than the budget.
    """
    heads_at = [place for place, pool in enumerate(pools) if pool.kind == "heads"]
    neurons_at = [place for place, pool in enumerate(pools) if pool.kind == "neurons"]
    if allocation == "AL-AM":
        return weakest(pools, range(len(pools)), budget)
    counts = [0] * len(pools)
    if allocation == "UL-UM":
        share = budget / sum(len(pool.scores) * pool.weights for pool in pools)
        for place in heads_at:
            counts[place] = min(int(share * len(pools[place].scores)), pools[place].removable)
    elif allocation == "UL-MM":
        for place in heads_at:
            of_layer = heads // len(heads_at)
            counts[place] = min(of_layer // pools[place].heads, pools[place].removable)
    elif heads_at:
        counts = list(_weakest_heads(pools, heads_at, heads))
    rest = budget - weights_of(pools, counts)
    if rest < 0:
        raise UsageError(
            "E-FLAP-HEADS",
            f"{heads} heads have {budget - rest} weights, the sparsity allows {budget}",
            "lower pruning.flap.remove_heads, or raise --sparsity",
        )
    second = (weakest if allocation == "AL-MM" else _in_proportion)(pools, neurons_at, rest)
    return tuple(first + more for first, more in zip(counts, second, strict=True))


def weights_of(pools: Sequence[UnitPool], counts: Sequence[int]) -> int:
    """Weights that go where each pool gives up that many units."""
    return sum(count * pool.weights for count, pool in zip(counts, pools, strict=True))


def weakest(pools: Sequence[UnitPool], places: Sequence[int], budget: int) -> tuple[int, ...]:
    """Units to take from each pool: those with the lowest scores of all ``places``, as many as the budget holds."""
    scores = torch.cat([pools[place].scores[: pools[place].removable] for place in places])
    owners = [place for place in places for _ in range(pools[place].removable)]
    counts = [0] * len(pools)
    smallest = min((pools[place].weights for place in places), default=0)
    for number in scores.argsort(stable=True).tolist():
        if budget < smallest:
            break
        place = owners[number]
        if pools[place].weights <= budget:
            counts[place] += 1
            budget -= pools[place].weights
    return tuple(counts)


def _weakest_heads(pools: Sequence[UnitPool], places: Sequence[int], heads: int) -> tuple[int, ...]:
    """The same for a number of heads: where keys are shared, a unit has several."""
    counted = [UnitPool(pool.kind, pool.scores, pool.heads) for pool in pools]
    return weakest(counted, places, heads)


def _in_proportion(pools: Sequence[UnitPool], places: Sequence[int], budget: int) -> tuple[int, ...]:
    """The same share of each pool of ``places``; what whole units leave over goes to the first ones that it fits."""
    counts = [0] * len(pools)
    total = sum(len(pools[place].scores) * pools[place].weights for place in places)
    for place in places:
        pool = pools[place]
        counts[place] = min(budget * len(pool.scores) // total, pool.removable)
    rest = budget - weights_of(pools, counts)
    for place in places:
        if pools[place].weights <= rest and counts[place] < pools[place].removable:
            counts[place] += 1
            rest -= pools[place].weights
    return tuple(counts)
