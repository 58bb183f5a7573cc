"""Medians, their spread, and what follows from two models' rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Figure:
    """A quantity measured several times: the median, and the quartiles between which half of the times lie."""

    median: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def figure(values: Sequence[float]) -> Figure:
    """Median and quartiles of ``values``, of which there is at least one; between two of them, linearly."""
    low, median, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return Figure(float(median), float(low), float(high), len(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """``ours`` over ``theirs``, round by round: what slows a whole round slows both, and falls out.

    Raises:
        ValueError: They do not have equally many rounds.
    """
    return figure([one / other for one, other in zip(ours, theirs, strict=True)])


def turn_order(count: int, turn: int) -> list[int]:
    """The order of ``count`` models in a round: forward, then backward, each time beginning with another one.

    Who comes after whom changes, so that what a model leaves behind (a warm processor, a full cache) does not
    always meet the same one.
    """
    order = [(place + turn // 2) % count for place in range(count)]
    return order if turn % 2 == 0 else order[::-1]
