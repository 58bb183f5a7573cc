"""How long the cells still to be made will take, by those that were made."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable


class Pace:
    """Time left: each open cell is reckoned as the finished ones of its recovery, else as all finished ones.

    Args:
        recoveries: Of the cells to be made, one name per cell.
    """

    def __init__(self, recoveries: Iterable[str]) -> None:
        self._open = Counter(recoveries)
        self._elapsed_s: dict[str, list[float]] = {}
        self._started = time.perf_counter()

    def start(self) -> None:
        """A cell begins."""
        self._started = time.perf_counter()

    def finish(self, recovery: str) -> float:
        """That cell is over; its seconds."""
        elapsed_s = time.perf_counter() - self._started
        self._elapsed_s.setdefault(recovery, []).append(elapsed_s)
        self._open[recovery] -= 1
        return elapsed_s

    def left_s(self, *, present: bool = False) -> float | None:
        """Seconds for the open cells, less what the ``present`` one has had; None before one is finished."""
        known = [seconds for own in self._elapsed_s.values() for seconds in own]
        if not known:
            return None
        total = 0.0
        for recovery, count in self._open.items():
            own = self._elapsed_s.get(recovery, known)
            total += max(count, 0) * sum(own) / len(own)
        return max(0.0, total - (time.perf_counter() - self._started if present else 0.0))
