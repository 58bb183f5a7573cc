"""The state folder of a run of several ranks: rank 0 writes and reads it, the others are told.

The state is that of one process: its windows are put together before they are stored and shared out again after, so
that a run may go on with another number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.ranks import Ranks
from compressor.run.state import Commit, StateFolder, StoredFile

__all__ = ["SharedStateFolder"]


class SharedStateFolder(StateFolder):
    """A state folder that all ranks call in the same order.

    Args:
        root: The folder, of rank 0 alone.
        ranks: Who shares it.
    """

    def __init__(self, root: Path, ranks: Ranks) -> None:
        super().__init__(root)
        self._ranks = ranks

    def store(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> StoredFile:
        """Write a file on rank 0; its name, size and hash on all."""
        row = asdict(super().store(name, tensors, metadata)) if self._ranks.is_root else {}
        return StoredFile(**json.loads(self._ranks.text(json.dumps(row))))

    def load(self, stored: StoredFile) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a file, read by rank 0, on all."""
        tensors, metadata = super().load(stored) if self._ranks.is_root else ({}, {})
        shapes = {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in tensors.items()
        }
        shapes, metadata = json.loads(self._ranks.text(json.dumps([shapes, metadata])))
        if not self._ranks.is_root:
            tensors = {
                name: torch.empty(shape, dtype=getattr(torch, dtype))
                for name, (dtype, shape) in shapes.items()
            }
        self._ranks.from_root([tensors[name] for name in shapes])
        return tensors, metadata

    def load_own(self, stored: StoredFile) -> dict[str, Tensor] | None:
        """Tensors of a file on rank 0; None on the others."""
        return super().load(stored)[0] if self._ranks.is_root else None

    def commit(
        self, facts: Mapping[str, Any], content: Mapping[str, Any], files: Sequence[StoredFile]
    ) -> None:
        """Make what was stored the newest point to go on from, on rank 0."""
        if self._ranks.is_root:
            super().commit(facts, content, files)

    def commits(self) -> Iterator[Commit | None]:
        """The commits of rank 0, newest first; None stands for a damaged one. All ranks look equally far."""
        found = super().commits() if self._ranks.is_root else iter(())
        end = object()
        while True:
            commit = next(found, end) if self._ranks.is_root else end
            row = None if commit is end else asdict(commit) if isinstance(commit, Commit) else "damaged"
            told = json.loads(self._ranks.text(json.dumps(row)))
            if told is None:
                return
            if told == "damaged":
                yield None
            else:
                files = tuple(StoredFile(**file) for file in told.pop("files"))
                yield Commit(**told, files=files)

    def remove(self) -> None:
        """Forget it all, on rank 0."""
        if self._ranks.is_root:
            super().remove()
