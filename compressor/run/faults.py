"""Named points of a run where a test can make something go wrong; inert unless an environment variable asks for it.

``BLOCKPRESS_FAULT=POINT:ACTION`` or ``POINT#N:ACTION``, the N-th time that the point is reached. Actions: ``kill`` ends
the program as ``kill -9`` does, ``pause`` stops it until it gets SIGCONT, ``enospc`` raises the error of a full disk,
``oom`` that of a device without memory, ``interrupt`` sends SIGINT to the program. ``POINT#N+:ACTION`` is the N-th time
and every one after it.
"""

from __future__ import annotations

import errno
import os
import signal

VARIABLE = "BLOCKPRESS_FAULT"

POINTS = (
    "blocks: before a window",
    "blocks: after a window",
    "state: before a file",
    "state: after a file",
    "state: before the commit",
    "state: after the commit",
    "export: before",
    "export: after",
    "validate: before",
    "publish: before",
    "publish: between two moves",
    "publish: after",
)

# Where the device's memory can run out in training.
MEMORY_POINTS = ("repair: before", "repair: after a step", "tuning: before", "tuning: after a step")

_reached: dict[str, int] = {}


def reach(point: str) -> None:
    """Tell that ``point`` is reached; goes wrong there if the environment says so.

    Raises:
        OSError: ENOSPC, where the action is ``enospc``.
        torch.OutOfMemoryError: Where the action is ``oom``.
        ValueError: ``point`` is none of ``POINTS`` and ``MEMORY_POINTS``.
    """
    if point not in POINTS + MEMORY_POINTS:
        raise ValueError(f"no such point: {point!r}")
    asked = os.environ.get(VARIABLE)
    if not asked:
        return
    where, _, action = asked.rpartition(":")
    name, _, number = where.partition("#")
    if name != point:
        return
    _reached[point] = _reached.get(point, 0) + 1
    first = int(number.removesuffix("+") or 1)
    if _reached[point] == first or (number.endswith("+") and _reached[point] > first):
        _go_wrong(action)


def _go_wrong(action: str) -> None:
    signals = {"kill": "SIGKILL", "pause": "SIGSTOP", "interrupt": "SIGINT"}
    if action in signals:
        os.kill(os.getpid(), getattr(signal, signals[action]))
    elif action == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory, on demand")
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise ValueError(f"no such action: {action!r}")
