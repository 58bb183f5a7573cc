"""What a run has finished so far, on the disk beside its output: commits that a kill at any moment leaves whole.

A state is a folder of immutable safetensors files and of commits, ``NUMBER.json``. A commit names the files that
belong to it with their hashes and carries a hash of itself; it is written last, after all its files are flushed. The
newest two commits are kept with what they name, so that a damaged one falls back to the one before. Nothing in a state
is code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.run.atomic import flush_folder, replace_file, replacing
from compressor.run.faults import reach
from exporters.plain_files import read_plain

__all__ = ["Commit", "StateFolder", "StoredFile"]

FORMAT = 1
_KEPT = 2  # commits
_MAX_COMMIT_BYTES = 2**28
_COMMIT = re.compile(r"(\d{5})\.json")
_FILE = re.compile(r"[a-z0-9-]{1,60}\.safetensors")


@dataclass(frozen=True)
class StoredFile:
    """A file of tensors in a state: its name, its bytes, and their sha256 (hex)."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """A point that a run can go on from.

    Attributes:
        number: Counts up from 1.
        facts: What decides the run's result, by name; only a run with equal facts may go on from here.
        content: Of the caller.
        files: What belongs to it.
    """

    number: int
    facts: Mapping[str, Any]
    content: Mapping[str, Any]
    files: tuple[StoredFile, ...]


class StateFolder:
    """The state of one output's run.

    Args:
        root: The folder; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def exists(self) -> bool:
        """Whether there are commits, damaged ones included."""
        return bool(self._numbers())

    def store(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> StoredFile:
        """Write a file of tensors and flush it; a file of that name is replaced as a whole.

        Raises:
            OSError, SafetensorError: It cannot be written.
        """
        reach("state: before a file")
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / f"{name}.safetensors"
        with replacing(path) as draft:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, draft, dict(metadata))
            stored = StoredFile(path.name, draft.stat().st_size, _sha256(draft))
        reach("state: after a file")
        return stored

    def load(self, stored: StoredFile) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a file."""
        with safe_open(self.root / stored.name, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118

    def load_own(self, stored: StoredFile) -> dict[str, Tensor] | None:
        """Tensors of a file for a caller that passes on what others need of it; None for those others."""
        return self.load(stored)[0]

    def commit(
        self, facts: Mapping[str, Any], content: Mapping[str, Any], files: Sequence[StoredFile]
    ) -> None:
        """Make what was stored the newest point to go on from; what no kept commit names is removed.

        Raises:
            OSError: It cannot be written; the commit before stands.
        """
        reach("state: before the commit")
        number = max(self._numbers(), default=0) + 1
        rows = [[stored.name, stored.size_bytes, stored.sha256] for stored in files]
        body = {"format": FORMAT, "facts": dict(facts), "content": dict(content), "files": rows}
        flush_folder(self.root)  # the names of the files must be there before a commit names them
        replace_file(self._path(number), json.dumps({**body, "sha256": _digest(body)}).encode())
        flush_folder(self.root)
        reach("state: after the commit")
        self._tidy()

    def commits(self) -> Iterator[Commit | None]:
        """The commits, newest first; None stands for a damaged one."""
        for number in sorted(self._numbers(), reverse=True):
            commit = self._read(number)
            yield (
                commit if commit is not None and all(self._is_whole(file) for file in commit.files) else None
            )

    def remove(self) -> None:
        """Forget it all."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.root / f"{number:05d}.json"

    def _numbers(self) -> list[int]:
        if not os.path.isdir(self.root):
            return []
        found = (_COMMIT.fullmatch(name) for name in os.listdir(self.root))
        return [int(match[1]) for match in found if match]

    def _read(self, number: int) -> Commit | None:
        try:
            body = json.loads(read_plain(self._path(number), _MAX_COMMIT_BYTES).decode("utf-8"))
            if body.pop("sha256") != _digest(body) or body["format"] != FORMAT:
                return None
            files = tuple(StoredFile(str(name), int(size), str(sha)) for name, size, sha in body["files"])
            if not all(_FILE.fullmatch(file.name) for file in files):
                return None
            return Commit(number, dict(body["facts"]), dict(body["content"]), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _is_whole(self, stored: StoredFile) -> bool:
        path = self.root / stored.name
        try:
            plain = path.is_file() and not path.is_symlink() and path.stat().st_size == stored.size_bytes
            return plain and _sha256(path) == stored.sha256
        except OSError:
            return False

    def _tidy(self) -> None:
        readable = filter(None, map(self._read, sorted(self._numbers(), reverse=True)))
        kept = set()
        for commit in itertools.islice(readable, _KEPT):
            kept |= {self._path(commit.number).name, *(file.name for file in commit.files)}
        for name in os.listdir(self.root):
            if name not in kept and not os.path.isdir(self.root / name):  # a folder is not of a state
                (self.root / name).unlink(missing_ok=True)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(2**22):
            digest.update(piece)
    return digest.hexdigest()
