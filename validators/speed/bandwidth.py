"""How fast this machine reads memory: the roof under which decoding runs, as every token reads every weight."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import psutil

_MIB = 2**20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_TYPES = (np.int64, np.int8)  # which of the two numpy reads faster depends on the processor


def largest_cache_bytes() -> int:
    """Size of the processor's largest cache; 0 where the system does not tell."""
    sizes = [0]
    for path in _CACHES.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * _UNITS.get(text[-1], 1))
    return max(sizes)


def buffer_bytes() -> int:
    """A size that no cache holds: eight times the largest, at least 256 MiB, at most an eighth of what is free."""
    wanted = max(256 * _MIB, 8 * largest_cache_bytes())
    return max(_MIB, min(wanted, psutil.virtual_memory().available // 8))


class Reader:
    """Reads a large buffer with several threads."""

    def __init__(self, threads: int, size_bytes: int | None = None) -> None:
        size = buffer_bytes() if size_bytes is None else size_bytes
        # Ones, because a page that was never written is no memory yet.
        self._buffer = np.ones(size // 64 * 8, np.int64)
        self._threads = threads

    def read(self) -> float:
        """Bytes per second of one reading of the whole buffer; the better of numpy's two ways.

        numpy lets go of the interpreter's lock while it reduces, so that threads read at the same time.
        """
        return max(self._read(self._buffer.view(kind)) for kind in _TYPES)

    def _read(self, values: np.ndarray[tuple[int], np.dtype[np.signedinteger]]) -> float:
        parts = np.array_split(values, self._threads)
        threads = [threading.Thread(target=np.maximum.reduce, args=(part,)) for part in parts]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return values.nbytes / (time.perf_counter() - started)
