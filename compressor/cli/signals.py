"""The first signal asks a run to stop between two blocks; the second one stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from compressor.cli.failures import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Calling it tells whether a stop was asked for."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.asked = False
        self._announce = announce

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.asked

    def receive(self, signum: int, _: FrameType | None) -> None:
        """Note the first signal; raise on the second.

        Raises:
            Interrupted: A stop was asked for already.
        """
        if self.asked:
            raise Interrupted(signum)
        self.asked = True
        self._announce("stopping at the next safe point; once more stops at once")


def _stop_at_once(signum: int, _: FrameType | None) -> None:
    raise Interrupted(signum)


@contextmanager
def stop_between_blocks(announce: Callable[[str], None]) -> Iterator[StopRequest]:
    """A stop request that signals set while the context lasts."""
    request = StopRequest(announce)
    with _installed(request.receive):
        yield request


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that what it began is cleaned up."""
    with _installed(_stop_at_once):
        yield


@contextmanager
def _installed(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install; a thread that calls main() keeps its program's own
        return
    before = {signum: signal.signal(signum, receive) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
