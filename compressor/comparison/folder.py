"""The output folder of a comparison: its results, and hidden beside them what the next call goes on from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from compressor.comparison.results import Figures, Measured, Scores, measured_from_tree, measured_tree
from compressor.errors import OutputRefused, UsageError
from compressor.run.atomic import replace_file
from compressor.run.lock import hold_output
from compressor.run.output import check_reachable, name_output
from exporters.plain_files import read_plain

STATE = ".compare"
PRODUCTS = ("compare.json", "compare.csv", "compare.md", "compare.html")
_SCHEMA = 1
_MAX_BYTES = 2**28


@dataclass(frozen=True)
class ResultsFolder:
    """A folder that is held for one comparison at a time.

    Attributes:
        root: Where the results lie.
    """

    root: Path

    @property
    def state(self) -> Path:
        """What the next call goes on from."""
        return self.root / STATE

    @property
    def shared(self) -> Path:
        """What cells share: windows, activations, pruned models. It goes when the grid is complete."""
        return self.state / "shared"

    def figures(self, fingerprint: str) -> Figures | None:
        """The figures of a cell that was finished before; None without them, or where they cannot be read."""
        return _read(Figures, self._file("cells", fingerprint))

    def keep(self, fingerprint: str, figures: Figures) -> None:
        """Record a finished cell."""
        _write(self._file("cells", fingerprint), figures)

    def scores(self, fingerprint: str) -> Scores | None:
        """The scores of a model on a set of tasks; None without them, or where they cannot be read."""
        return _read(Scores, self._file("scores", fingerprint))

    def keep_scores(self, fingerprint: str, scores: Scores) -> None:
        """Record what tasks gave on a model."""
        _write(self._file("scores", fingerprint), scores)

    def _file(self, kind: str, fingerprint: str) -> Path:
        return self.state / kind / f"{fingerprint}.json"

    def forget_shared(self) -> None:
        """Remove what cells share; every cell that is made later makes it again."""
        shutil.rmtree(self.shared, ignore_errors=True)

    def write(self, name: str, text: str) -> Path:
        """Put a result into the folder; its path."""
        path = self.root / name
        replace_file(path, text.encode())
        return path


@contextmanager
def reserve_folder(
    out: str | Path, force: bool, *, model: str | Path | None = None
) -> Iterator[ResultsFolder]:
    """The folder of ``--out``, held while the context lasts; made if need be.

    Args:
        out: A new folder, an empty one, or that of an earlier comparison, which goes on.
        force: Forget the earlier comparison; other files may lie there and stay.
        model: The input model; where it is a local folder, the output must stay clear of it.

    Raises:
        UsageError: E-OUTPUT-NAME; the path names a file.
        OutputRefused: Another comparison holds it, it cannot be written, or it holds other files.
    """
    plan = name_output(out)
    if plan.is_file:
        raise UsageError(
            "E-OUTPUT-KIND", f"--out {out} names a file, a comparison is a folder", "give a folder"
        )
    with hold_output(plan.folder / PRODUCTS[0]):
        check_reachable(plan, model=model)
        folder = ResultsFolder(plan.folder)
        _refuse_links(folder)
        marker = folder.state / "state.json"
        found = sorted(os.listdir(folder.root)) if folder.root.is_dir() else []
        if found and not force and not marker.is_file():
            raise OutputRefused(
                "E-OUTPUT-EXISTS",
                f"the folder {folder.root} holds {found[0]}, and no comparison that could go on",
                "give another --out, or add --force to write beside what lies there",
            )
        if force:
            _forget(folder)
        folder.state.mkdir(parents=True, exist_ok=True)
        replace_file(marker, json.dumps({"schema": _SCHEMA}).encode())
        yield folder


def _refuse_links(folder: ResultsFolder) -> None:
    """A link would let the state be written, and removed, in a folder that nobody named."""
    for place in (folder.state, *(folder.state / name for name in ("cells", "scores", "shared"))):
        if os.path.islink(place) or (os.path.lexists(place) and not os.path.isdir(place)):
            raise OutputRefused(
                "E-OUTPUT-KIND",
                f"{place} is no folder of its own, and a comparison keeps its state there",
                "look at what it is, then remove it",
            )


def _forget(folder: ResultsFolder) -> None:
    shutil.rmtree(folder.state, ignore_errors=True)
    for name in PRODUCTS:
        (folder.root / name).unlink(missing_ok=True)


def _read(kind: type[Measured], path: Path) -> Measured | None:
    try:
        return measured_from_tree(kind, json.loads(read_plain(path, _MAX_BYTES).decode("utf-8")))
    except (OSError, ValueError, ValidationError, AttributeError, TypeError, RecursionError):
        return None


def _write(path: Path, measured: Figures | Scores) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(measured_tree(measured), ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, text.encode())
