"""Seconds per stage and peak memory of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Measure:
    """Collects wall seconds by stage; the peaks are the process's so far."""

    def __init__(self) -> None:
        self.timings: dict[str, float] = {}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall seconds spent inside to stage ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - started


def peak_host_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:  # Linux; getrusage would count the parent's memory too, of which a child is a copy until it loads its program
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
        return None if peak is None else int(peak)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """Largest CUDA memory in use so far; None without CUDA."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
