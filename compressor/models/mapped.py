"""Weights that are views of a mapped file: read from the disk as they are touched, and given back when asked.

transformers maps safetensors, so that a weight which needs no conversion lies in the file's pages and not in memory of
its own. Such pages count as resident until the system needs them elsewhere; giving them back early keeps the resident
memory of a pass over the blocks at about one block. The system's cache of the file stays as it is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

__all__ = ["MappedFiles"]

_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """Where files are mapped into this program, as the system says; nowhere, on systems that do not say it.

    Args:
        paths: Files that may be mapped. Mappings that come later are not seen.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        wanted = {os.path.realpath(path) for path in paths}
        self._spans = [span for span, path in _mappings() if path in wanted]

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's values lie in one of the files."""
        begin, end = _place(tensor)
        return any(first <= begin and end <= last for first, last in self._spans)

    def give_back(self, tensors: Iterable[Tensor]) -> None:
        """Let the system take the pages that hold nothing but these tensors; the next touch reads them again.

        Tensors that do not lie in the files are left alone. Whatever was written to a tensor is lost: it has the
        file's values again.
        """
        if not self._spans:
            return
        page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
        for tensor in tensors:
            begin, end = _place(tensor)
            first, last = -(-begin // page) * page, end // page * page
            if first < last and self.holds(tensor):
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _place(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last address of a contiguous tensor's values."""
    begin = tensor.data_ptr()
    return begin, begin + (tensor.numel() * tensor.element_size() if tensor.is_contiguous() else 0)


def _mappings() -> Iterable[tuple[tuple[int, int], str]]:
    """Address range and path of each mapped file."""
    if sys.platform != "linux":
        return
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].startswith("/"):
            first, last = (int(address, 16) for address in parts[0].split("-"))
            yield (first, last), parts[5]
