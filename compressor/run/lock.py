"""One run per output: a lock in the cache folder, keyed by the real path of the ONNX file to be written.

The kernel drops the lock with the process that holds it, so a killed run leaves nothing to clear away.
Beside the lock lies a note that names the holder for the message of a run that is turned away. This module
imports nothing heavy: the lock is taken before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from compressor.errors import OutputRefused
from compressor.run.cache import cache_folder

NOTE_WAIT_S = 0.5  # a new holder writes its note at once after it has the lock


@dataclass
class _Hold:
    lock: FileLock
    thread: int
    depth: int


_guard = threading.Lock()
_holds: dict[Path, _Hold] = {}


def lock_path(onnx: Path) -> Path:
    """The lock file of an output. Two spellings of one path give the same file."""
    real = Path(os.path.realpath(onnx.parent)) / onnx.name
    return cache_folder("locks") / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.lock"


@contextmanager
def hold_output(onnx: Path) -> Iterator[None]:
    """Keep other runs from writing ``onnx`` while the context lasts. The same thread may enter again.

    Raises:
        OutputRefused: Another run, or another thread of this process, holds the output.
    """
    path = lock_path(onnx)
    _acquire(path, onnx)
    try:
        yield
    finally:
        with _guard:
            hold = _holds[path]
            hold.depth -= 1
            if hold.depth == 0:
                del _holds[path]
                hold.lock.release()


def _acquire(path: Path, onnx: Path) -> None:
    me = threading.get_ident()
    with _guard:
        hold = _holds.get(path)
        if hold is not None and hold.thread == me:
            hold.depth += 1
            return
        lock = FileLock(path, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise _locked(path, onnx) from None
        note = {"pid": os.getpid(), "host": socket.gethostname(), "target": str(onnx)}
        path.with_suffix(".json").write_text(json.dumps(note), encoding="utf-8")
        _holds[path] = _Hold(lock, me, 1)


def _locked(path: Path, onnx: Path) -> OutputRefused:
    pid, host = _holder(path)
    return OutputRefused(
        "E-OUTPUT-LOCKED",
        f"{onnx.name} is being written by another run (pid {pid} on {host})",
        "wait for that run to end, or give another --out",
    )


def _holder(path: Path) -> tuple[str, str]:
    """Process id and host of the run that holds the lock, from its note."""
    deadline = time.monotonic() + NOTE_WAIT_S
    while True:
        try:
            note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            pid, host = int(note["pid"]), str(note["host"])
            if host != socket.gethostname() or _alive(pid) or time.monotonic() > deadline:
                return str(pid), host
        except (OSError, ValueError, KeyError, TypeError):
            if time.monotonic() > deadline:
                return "unknown", "an unknown host"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))
