"""Training that goes on with less at once where the device's memory does not hold a batch.

A batch goes through the blocks in parts whose gradients are added up: the optimiser sees the same batch, in the same
order, with the same random numbers, and only sums run in another order. What was under way begins again, so that a
result does not depend on the step at which the memory ran out.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from compressor.errors import OutOfResources
from compressor.progress import Notice, Progress

__all__ = ["MicroBatch"]

Result = TypeVar("Result")


class MicroBatch:
    """The most windows that go through the blocks at once; it halves when the device is out of memory, and stays so.

    Args:
        progress: Receives a notice of each halving.
        may_halve: Whether it may be tried again: not where other processes have gone on meanwhile.

    Attributes:
        size: Windows at once, ``None`` for whole batches.
        notices: What has been halved, one line each.
    """

    def __init__(self, progress: Progress, *, may_halve: bool = True) -> None:
        self._progress = progress
        self._may_halve = may_halve
        self.size: int | None = None
        self.notices: list[str] = []

    def attempt(
        self,
        work: Callable[[int | None], Result],
        *,
        again: Callable[[], None],
        batch_size: int,
        what: str,
        remedy: str,
    ) -> Result:
        """What ``work`` gives, told how many windows may go through at once.

        Args:
            work: May raise ``torch.OutOfMemoryError`` at any point.
            again: Puts back what an attempt has changed, before the next one.
            batch_size: Windows of a whole batch.
            what: What is worked on, such as ``the repair of model.layers.3``.
            remedy: What to do where a single window is too much.

        Raises:
            OutOfResources: E-DEVICE-MEMORY: there is no room for one window.
        """
        while True:
            try:
                return work(self.size)
            except torch.OutOfMemoryError as error:
                before = min(self.size or batch_size, batch_size)
                if before == 1 or not self._may_halve:
                    raise OutOfResources(
                        "E-DEVICE-MEMORY",
                        f"{what} does not fit into the device's memory, "
                        f"{'one window' if before == 1 else f'{before} windows'} at a time: {_first_line(error)}",
                        remedy,
                    ) from None
            # Behind the handler: until here the exception holds the frames, and they hold the tensors.
            _forget_cached()
            self.size = before // 2
            again()
            message = (
                f"the device's memory ran out in {what}: {self.size} windows at once instead of {before}; "
                "batches are the same, their gradients are added up"
            )
            self.notices.append(message)
            self._progress(Notice(message))


def _forget_cached() -> None:
    """Give memory that no tensor holds back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
