"""The dense model's hidden states after each block: computed along the way, or remembered from an earlier pass.

Notation: N windows, T tokens each, hidden width D.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, Protocol

from torch import nn

from compressor.models.source import BlockSource
from compressor.propagation import advance
from compressor.run.atomic import replacing
from compressor.streams import Activations

Role = Literal["calibration", "heldout"]

_KEPT_FREE_BYTES = 2**30  # of the disk, for whoever else writes there


class DensePath(Protocol):
    """Moves hidden states of the dense model on by one block."""

    def advance(self, role: Role, index: int, block: nn.Module, states: Activations) -> None:
        """Turn ``states`` (N, T, D), which enter block ``index``, into what the dense ``block`` makes of them."""
        ...


class ComputedPath:
    """Runs every block."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source

    def advance(self, role: Role, index: int, block: nn.Module, states: Activations) -> None:
        """Turn ``states`` (N, T, D), which enter block ``index``, into what the dense ``block`` makes of them."""
        advance(self._source, index, block, states)


class RememberedPath:
    """Reads what an earlier pass has written; runs what it has not, and writes that as long as the budget lasts.

    The files hold the very float32 numbers, so remembering changes no result.

    Args:
        source: The dense blocks.
        folder: Of this model and these windows; nothing else may be written into it.
        budget_bytes: What all of ``folder``'s parent may take on the disk. 0 writes nothing.
    """

    def __init__(self, source: BlockSource, folder: Path, budget_bytes: int) -> None:
        self._computed = ComputedPath(source)
        self._folder, self._budget_bytes = folder, budget_bytes

    def advance(self, role: Role, index: int, block: nn.Module, states: Activations) -> None:
        """Turn ``states`` (N, T, D), which enter block ``index``, into what the dense ``block`` makes of them."""
        path = self._folder / f"{role}-{index}.f32"
        if _read(path, states):
            return
        self._computed.advance(role, index, block, states)
        if self._fits(states.size_bytes):
            with replacing(path) as draft:
                states.states.numpy().tofile(draft)

    def _fits(self, size_bytes: int) -> bool:
        root = self._folder.parent
        used = sum(path.stat().st_size for path in root.rglob("*.f32"))
        if used + size_bytes > self._budget_bytes:
            return False
        self._folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self._folder).free > size_bytes + _KEPT_FREE_BYTES


def _read(path: Path, states: Activations) -> bool:
    """Fill ``states`` from the file, without a second copy in memory; False without a file of the right size."""
    if not path.is_file() or path.stat().st_size != states.size_bytes:
        return False
    with path.open("rb", buffering=0) as stream:
        place = states.states.numpy().data.cast("B")
        done = 0
        while done < len(place):
            count = stream.readinto(place[done:])
            if not count:
                raise OSError(f"{path} ended early")
            done += count
    return True
