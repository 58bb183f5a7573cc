"""Publish a finished output: the final path is absent, old or complete, never half.

Everything is first written into a hidden staging folder on the same file system. A new folder output is
then one rename. Products beside others are many renames, ordered so that no reader meets a mixture: the old
``.onnx`` leaves first, the new one comes last. A journal in the staging folder lets the next run complete
what a kill cut short; an error on the way is undone at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from types import TracebackType

from compressor.errors import OutputRefused
from compressor.run.atomic import flush_folder
from compressor.run.faults import reach
from compressor.run.output import STAGING_INSIDE, OutputPlan, check_free
from exporters.plain_files import is_spelled, read_plain

JOURNAL = "journal.json"
_MAX_JOURNAL_BYTES = 2**24


class Staging:
    """A hidden folder that the products are written into and published from.

    Enter it while the output is held (``reserve_output``). ``plan`` names the products inside the staging
    folder; ``scratch`` is for files that are not published. Leaving the context without ``publish`` removes
    everything and leaves an older output as it was.
    """

    def __init__(self, plan: OutputPlan) -> None:
        self.final = plan
        self.root = _staging_roots(plan)[-1 if os.path.isdir(plan.folder) else 0]
        self.plan = plan.within(self.root / "new")
        self.scratch = self.root / "scratch"

    def __enter__(self) -> Staging:
        """Create the staging folder.

        Raises:
            OutputRefused: The folder cannot be created, or the output has appeared meanwhile.
        """
        finish_interrupted_publication(self.final)
        check_free(self.final)
        try:
            self.plan.folder.mkdir(parents=True)
            self.scratch.mkdir()
        except OSError as error:
            raise OutputRefused(
                "E-OUTPUT-NOT-WRITABLE",
                f"cannot write beside {self.final.target}: {error.strerror or error}",
                "give an --out of a shorter name, or in a folder that you can write"
                if error.errno == errno.ENAMETOOLONG
                else "give an --out in a folder that you can write",
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the staging folder, unless it holds the journal of an unfinished publication."""
        if not (self.root / JOURNAL).exists():
            shutil.rmtree(self.root, ignore_errors=True)

    def publish(self) -> tuple[Path, ...]:
        """The published paths, the ``.onnx`` last. Replaces the products of an older output.

        Raises:
            ValueError: The staging folder holds no ``.onnx``, or a file that does not belong to the output.
            OSError: A write or rename failed; the older output is back in place.
        """
        new = self.plan.folder
        names = sorted(
            (entry.name for entry in new.iterdir()), key=lambda name: (name == self.plan.onnx.name, name)
        )
        if not names or names[-1] != self.plan.onnx.name:
            raise ValueError(f"nothing to publish: {self.plan.onnx.name} was not written")
        strangers = set(names) - {path.name for path in self.final.products} if self.final.is_file else set()
        if strangers:
            raise ValueError(f"files that do not belong to the output: {sorted(strangers)}")
        _settle(new)
        reach("publish: before")
        if self.final.is_file or self.final.folder.exists():
            self._replace_one_by_one(names)
        else:
            _move(new, self.final.folder)
            flush_folder(self.final.folder.parent)
        reach("publish: after")
        return tuple(self.final.folder / name for name in names)

    def _replace_one_by_one(self, names: list[str]) -> None:
        (self.root / "old").mkdir()
        folder = self.final.folder
        leaving = [name for name in _leaving(self.final, names) if os.path.lexists(folder / name)]
        draft, journal = self.root / "journal.draft", self.root / JOURNAL
        draft.write_text(json.dumps({"leaving": leaving, "coming": names}), encoding="utf-8")
        _fsync_file(draft)
        draft.rename(journal)
        try:
            flush_folder(self.root)
            _roll_forward(self.root, folder, leaving, names)
        except BaseException:
            _roll_back(self.root, folder, leaving, names)
            journal.unlink()
            raise
        journal.unlink()


def finish_interrupted_publication(plan: OutputPlan) -> bool:
    """Complete a publication that a kill cut short, or remove the leftovers of one that had not begun.

    Returns whether a publication was completed. Call it while the output is held.

    Raises:
        OSError: A rename failed; the journal stays for the next attempt.
    """
    completed = [_finish(root, plan) for root in _staging_roots(plan) if os.path.isdir(root)]
    return any(completed)


def _finish(root: Path, plan: OutputPlan) -> bool:
    try:
        journal = json.loads(read_plain(root / JOURNAL, _MAX_JOURNAL_BYTES).decode("utf-8"))
        leaving, coming = (
            [str(name) for name in journal["leaving"]],
            [str(name) for name in journal["coming"]],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        shutil.rmtree(root, ignore_errors=True)
        return False
    if not all(_is_product(name, plan) for name in [*leaving, *coming]):
        raise OutputRefused(
            "E-OUTPUT-JOURNAL",
            f"{root / JOURNAL} names a file that is no product of {plan.target.name}",
            f"look at {root}, then remove it",
        )
    _roll_forward(root, plan.folder, leaving, coming)
    (root / JOURNAL).unlink()
    shutil.rmtree(root, ignore_errors=True)
    return True


def _is_product(name: str, plan: OutputPlan) -> bool:
    """Whether a journal may name it: of an output that is a file the products are known, of a folder any file."""
    if plan.is_file:
        return name in {path.name for path in plan.products}
    return Path(name).name == name and name not in ("", "..") and "\0" not in name and is_spelled(name)


def _staging_roots(plan: OutputPlan) -> tuple[Path, ...]:
    """Beside the target, and inside a folder that exists already: it may be a mount of its own."""
    beside = plan.target.parent / f".{plan.target.name}.staging"
    return (beside,) if plan.is_file else (beside, plan.folder / STAGING_INSIDE)


def _leaving(plan: OutputPlan, coming: list[str]) -> list[str]:
    """Names of the older output, the ``.onnx`` first: fixed products, what comes, what its manifest names."""
    names = [path.name for path in reversed(plan.products)] + coming
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if not plan.is_file:
            rows = json.loads(plan.manifest.read_text(encoding="utf-8"))["files"]
            names += [str(row["name"]) for row in rows if Path(str(row["name"])).name == str(row["name"])]
    return list(dict.fromkeys(name for name in names if name not in ("", ".", "..")))


def _roll_forward(root: Path, folder: Path, leaving: list[str], coming: list[str]) -> None:
    """Move the old products aside, then the new ones in. Running it again after any stop ends the same."""
    for name in leaving:
        if not os.path.lexists(root / "old" / name) and os.path.lexists(folder / name):
            _move(folder / name, root / "old" / name)
    reach("publish: between two moves")
    for name in coming:
        if os.path.lexists(root / "new" / name):
            _move(root / "new" / name, folder / name)
    flush_folder(folder)


def _roll_back(root: Path, folder: Path, leaving: list[str], coming: list[str]) -> None:
    """Undo ``_roll_forward`` from wherever it stopped."""
    for name in reversed(coming):
        if not os.path.lexists(root / "new" / name):
            _move(folder / name, root / "new" / name)
    for name in reversed(leaving):
        if os.path.lexists(root / "old" / name):
            _move(root / "old" / name, folder / name)
    with contextlib.suppress(OSError):  # the names are right already, and an error is under way
        flush_folder(folder)


def _move(source: Path, target: Path) -> None:
    os.replace(source, target)


def _settle(folder: Path) -> None:
    """Give every file the mode that the umask asks for and flush it to the disk, folders last."""
    mode = folder.stat().st_mode & 0o777  # mkdir applied the umask
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(place) / name
            path.chmod(mode & 0o666)
            _fsync_file(path)
        for name in folders:
            (Path(place) / name).chmod(mode)
        flush_folder(Path(place))


def _fsync_file(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
