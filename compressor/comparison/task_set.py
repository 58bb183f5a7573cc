"""The zero-shot tasks of a comparison, and what decides their scores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.comparison.request import TaskChoice
from compressor.comparison.results import Scores, TaskFacts
from compressor.report.schema import portable_name
from validators.harness import harness_version

_CACHES = ("__pycache__",)  # python writes it beside the code that a YAML file names


@dataclass(frozen=True)
class TaskSet:
    """Tasks by name, with the content of the folder that local ones come from.

    Attributes:
        choice: What a scoring is given.
        folder_sha256: Digest of that folder; None without one.
        lm_eval: Version of lm-eval-harness.
    """

    choice: TaskChoice
    folder_sha256: str | None
    lm_eval: str

    @property
    def digest(self) -> str:
        """Digest of all that decides what a model scores; where the folder lies does not."""
        named = self.choice.model_dump(mode="json", exclude={"folder"})
        return hashlib.sha256(repr((named, self.folder_sha256, self.lm_eval)).encode()).hexdigest()

    def facts(self, dense: Scores | None) -> TaskFacts:
        """What the document says of them, with the scores of the dense model."""
        choice = self.choice
        return TaskFacts(
            names=choice.names,
            folder=None if choice.folder is None else portable_name(choice.folder),
            folder_sha256=self.folder_sha256,
            limit=choice.limit,
            max_tokens=choice.max_tokens,
            lm_eval=self.lm_eval,
            dense=dense,
        )


def task_set(
    names: Sequence[str], folder: str | Path | None, limit: int | None, *, max_tokens: int
) -> TaskSet | None:
    """The tasks that are asked for; None without any."""
    if not names:
        return None
    place = None if folder is None else Path(folder).absolute()
    choice = TaskChoice(
        names=tuple(names),
        folder=None if place is None else str(place),
        limit=limit,
        max_tokens=max_tokens,
    )
    return TaskSet(choice, None if place is None else folder_digest(place), harness_version())


def folder_digest(folder: Path) -> str:
    """sha256 over names and contents of all files in a folder, hidden ones and caches left out."""
    digest = hashlib.sha256()
    for path in sorted(_files(folder)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _CACHES]
        yield from (
            path for name in names if not name.startswith(".") and (path := Path(place, name)).is_file()
        )
