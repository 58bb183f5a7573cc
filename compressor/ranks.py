"""The processes that share one run; here the only one there is, for which every sum is its own part.

Windows are shared out over the ranks, blocks are not: each rank holds the whole block and works on its own windows, and
what depends on all windows is summed up. All ranks then decide the same from the same numbers. Several processes are
``compressor.process_group``; this module is what the rest of the program knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["ALONE", "Ranks"]


class Ranks:
    """One process that is alone.

    Attributes:
        rank: Its number, from 0; rank 0 writes, prints and decides.
        world: How many processes there are.
        local_world: How many of them are on this machine.
    """

    rank = 0
    world = 1
    local_world = 1

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, windows: int, rank: int | None = None) -> range:
        """Which of ``windows`` windows a rank holds, this one if none is named: a stretch, as long as the others'."""
        number = self.rank if rank is None else rank
        return range(windows * number // self.world, windows * (number + 1) // self.world)

    def holder(self, row: int, windows: int) -> int:
        """The rank that holds window ``row`` of ``windows``."""
        return next(rank for rank in range(self.world) if row in self.share(windows, rank))

    def total(self, *parts: float) -> tuple[float, ...]:
        """The sum of each number over all ranks, in float64 and in the order of the ranks."""
        return parts

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag

    def agreed(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """``stop``, answered with yes on all ranks if it is yes on any."""
        return stop

    def text(self, text: str) -> str:
        """Rank 0's."""
        return text

    def summed(self, part: Tensor) -> Tensor:
        """The sum of ``part`` over all ranks; equal shapes and types."""
        return part

    def gathered(self, part: Tensor) -> list[Tensor]:
        """``part`` of every rank, on the CPU; equal shapes and types."""
        return [part.cpu()]

    def from_root(self, tensors: Sequence[Tensor]) -> None:
        """Set ``tensors`` to rank 0's, in place."""

    def sum_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """Set each weight's gradient to the sum over all ranks; None stays where no rank has one."""

    def exchange(
        self, sent: Mapping[int, Tensor], expected: Mapping[int, tuple[int, ...]], like: Tensor
    ) -> dict[int, Tensor]:
        """Send tensors to ranks, and receive others from ranks, of type and device of ``like``.

        Args:
            sent: By rank that is to have it.
            expected: Shape by rank that sends it.
            like: Says type and device.
        """
        return {}

    def send_rows(self, rows: Tensor, rank: int) -> None:
        """Send ``rows`` (n, ...), on the CPU, to a rank that asks for them."""

    def receive_rows(self, into: Tensor, places: range, rank: int) -> None:
        """Write what a rank sends into rows of ``into``, on the CPU."""

    def check_same(self, name: str, digest: bytes) -> None:
        """Do nothing where all ranks have the same digest of ``name``.

        Raises:
            OutOfResources: E-RANKS-DIVERGED.
        """

    def part(self) -> None:
        """Let every rank go its way: none waits for another from here on."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks come out of the context, or none: the error of one is the error of all.

        Nothing inside may wait for another rank.
        """
        yield


ALONE = Ranks()


def deal(rows: Sequence[int], windows: int, ranks: Ranks) -> list[list[int]]:
    """The rows of one batch that each rank works on, as many as the others'; its own ones where it can.

    Args:
        rows: Of a batch, out of ``windows`` windows that are shared out over the ranks.
        windows: N.
        ranks: Who shares.

    Returns:
        Rows by rank, each in the order of the batch.
    """
    own: list[list[int]] = [[] for _ in range(ranks.world)]
    for row in rows:
        own[ranks.holder(row, windows)].append(row)
    most_first = sorted(range(ranks.world), key=lambda rank: -len(own[rank]))
    each, rest = divmod(len(rows), ranks.world)
    quota = {rank: each + (place < rest) for place, rank in enumerate(most_first)}
    parts = [own[rank][: quota[rank]] for rank in range(ranks.world)]
    left = [row for rank in range(ranks.world) for row in own[rank][quota[rank] :]]
    for rank, part in enumerate(parts):
        lacking = quota[rank] - len(part)
        part += left[:lacking]
        del left[:lacking]
    place = {row: number for number, row in enumerate(rows)}
    return [sorted(part, key=place.__getitem__) for part in parts]
