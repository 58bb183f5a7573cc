"""Where the products of a run go: their names, and whether they may be written there."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from compressor.errors import OutputRefused, UsageError
from compressor.run.lock import hold_output

ONNX_SUFFIX = ".onnx"
# The staging folder and the state of an unfinished run inside an output folder that exists already.
STAGING_INSIDE = ".blockpress.staging"
STATE_INSIDE = ".blockpress.state"


@dataclass(frozen=True)
class OutputPlan:
    """The place and the name of every product.

    ``--out sparse.onnx`` puts ``sparse.onnx``, ``sparse.onnx.data``, ``sparse.hf/``,
    ``sparse.report.json``, ``sparse.report.html`` and ``sparse.manifest.json`` beside each other. ``--out
    FOLDER`` puts ``model.onnx`` and the rest, with the files that a Hugging Face loader needs, into that folder.
    """

    target: Path  # what was asked for, absolute
    folder: Path  # where the products lie
    stem: str  # "sparse", or "model" in a folder
    is_file: bool
    force: bool = False

    @property
    def onnx(self) -> Path:
        """The graph; it is published last."""
        return self.folder / f"{self.stem}.onnx"

    @property
    def data(self) -> Path:
        """The external data of the graph."""
        return self.folder / f"{self.stem}.onnx.data"

    @property
    def manifest(self) -> Path:
        """Hashes of every model file."""
        return self.folder / f"{self.stem}.manifest.json"

    @property
    def report_json(self) -> Path:
        """The report for machines."""
        return self.folder / f"{self.stem}.report.json"

    @property
    def report_html(self) -> Path:
        """The report for people."""
        return self.folder / f"{self.stem}.report.html"

    @property
    def hf(self) -> Path | None:
        """The PyTorch sparse model; a folder output has none."""
        return self.folder / f"{self.stem}.hf" if self.is_file else None

    @property
    def masks(self) -> Path:
        """The packed masks."""
        return self.folder / "model.masks.safetensors" if self.hf is None else self.hf / "masks.safetensors"

    @property
    def state_roots(self) -> tuple[Path, ...]:
        """Where the state of an unfinished run may lie: beside the output, or inside a folder that is there already."""
        beside = self.target.parent / f".{self.target.name}.state"
        return (beside,) if self.is_file else (beside, self.folder / STATE_INSIDE)

    @property
    def hidden(self) -> tuple[Path, ...]:
        """Every place where unfinished files may lie."""
        beside = self.target.parent / f".{self.target.name}.staging"
        inside = () if self.is_file else (self.folder / STAGING_INSIDE,)
        return (*self.state_roots, beside, *inside)

    @property
    def state(self) -> Path:
        """Where this run keeps its state."""
        return self.state_roots[-1 if os.path.isdir(self.folder) else 0]

    @property
    def products(self) -> tuple[Path, ...]:
        """Every product of a fixed name, the ``.onnx`` last. A folder output has more files beside these."""
        return (
            self.data,
            self.hf or self.masks,
            self.report_json,
            self.report_html,
            self.manifest,
            self.onnx,
        )

    def within(self, folder: Path) -> OutputPlan:
        """The same products in another folder."""
        return replace(self, folder=folder)


def plan_output(out: str | Path, force: bool = False, *, model: str | Path | None = None) -> OutputPlan:
    """The plan of ``--out``, after every check that needs no lock. Changes nothing on disk.

    Args:
        out: A path ending in ``.onnx`` is a file, anything else a folder.
        force: Whether existing products may be replaced.
        model: The input model; where it is a local folder, the output must stay clear of it.

    Raises:
        UsageError: The path has no name.
        OutputRefused: The parent is missing or not writable, something else lies there, the output exists.
    """
    plan = name_output(out, force)
    _check_place(plan)
    _check_clear_of_model(plan, model)
    check_free(plan)
    _check_writable(plan)
    return plan


@contextlib.contextmanager
def reserve_output(
    out: str | Path, force: bool = False, *, model: str | Path | None = None, may_be_done: bool = False
) -> Iterator[OutputPlan]:
    """Plan the output and hold its lock while the context lasts; complete what a kill cut short.

    Args:
        out: See ``plan_output``.
        force: Whether existing products may be replaced.
        model: See ``plan_output``.
        may_be_done: Let an output with a report pass, since it may be this very run's; the caller looks.

    The same thread may enter again, so the command line can take the lock before torch is loaded and the
    pipeline can take it once more.

    Raises:
        UsageError, OutputRefused: As ``plan_output``; also when another run holds the output.
    """
    from compressor.run.publish import finish_interrupted_publication

    plan = name_output(out, force)
    _check_place(plan)
    with hold_output(plan.onnx):
        finish_interrupted_publication(plan)
        if may_be_done and plan.report_json.is_file():
            check_reachable(plan, model=model)
            yield plan
        else:
            yield plan_output(out, force, model=model)


def check_reachable(plan: OutputPlan, *, model: str | Path | None = None) -> None:
    """Do nothing where the output can be written, whatever of it exists already. Changes nothing on disk.

    Raises:
        OutputRefused: The parent is missing or not writable, something else lies there, or it lies in ``model``.
    """
    _check_place(plan)
    _check_clear_of_model(plan, model)
    _check_writable(plan)


def name_output(out: str | Path, force: bool = False) -> OutputPlan:
    """The names alone, without a look at the disk.

    Raises:
        UsageError: The path has no name.
    """
    text = os.fspath(out)
    if (
        not text.strip()
        or text.lower().endswith(f"/{ONNX_SUFFIX}")
        or text.lower() == ONNX_SUFFIX
        or "\0" in text
    ):
        raise UsageError(
            "E-OUTPUT-NAME", f"--out {text!r} names no file", "give a path such as sparse.onnx or a folder"
        )
    target = Path(os.path.abspath(text))
    if text.lower().endswith(ONNX_SUFFIX):
        return OutputPlan(target, target.parent, target.name[: -len(ONNX_SUFFIX)], True, force)
    return OutputPlan(target, target, "model", False, force)


def check_free(plan: OutputPlan) -> None:
    """Refuse when a product exists and may not be replaced.

    Raises:
        OutputRefused: The output exists and ``force`` is not set.
    """
    if plan.force:
        return
    if plan.is_file:
        found = next((path for path in reversed(plan.products) if os.path.lexists(path)), None)
    else:
        entries = plan.folder.iterdir() if os.path.isdir(plan.folder) else iter(())
        found = next((path for path in entries if path.name not in (STAGING_INSIDE, STATE_INSIDE)), None)
    if found is not None:
        raise OutputRefused(
            "E-OUTPUT-EXISTS",
            f"{found} exists already"
            if plan.is_file
            else f"the folder {plan.folder} is not empty: it holds {found.name}",
            "add --force to replace it, or give another --out",
        )


def _check_place(plan: OutputPlan) -> None:
    parent = plan.target.parent
    if not os.path.isdir(parent):  # Path.is_dir raises for a name that is too long
        raise OutputRefused(
            "E-OUTPUT-PARENT",
            f"the folder {parent} for the output does not exist",
            f"create it: mkdir -p {parent}",
        )
    for place in plan.hidden:
        # Through a link the run would write, and in the end remove files, in a folder that nobody named.
        if os.path.islink(place) or (os.path.lexists(place) and not os.path.isdir(place)):
            raise OutputRefused(
                "E-OUTPUT-KIND",
                f"{place} is no folder of its own, and a run keeps its unfinished files there",
                "look at what it is, then remove it",
            )
    is_folder = os.path.isdir(plan.target)
    if plan.is_file and is_folder:
        raise OutputRefused(
            "E-OUTPUT-KIND",
            f"{plan.target} is a folder, and a path ending in .onnx names a file",
            "give another --out, or remove that folder",
        )
    if os.path.lexists(plan.target) and not (is_folder or (plan.is_file and _replaceable(plan.target))):
        raise OutputRefused(
            "E-OUTPUT-KIND",
            f"{plan.target} exists and is not a {'regular file' if plan.is_file else 'folder'}",
            "give another --out; a path ending in .onnx is a file, any other a folder",
        )


def _replaceable(path: Path) -> bool:
    return path.is_file() or (path.is_symlink() and not path.exists())


def _check_clear_of_model(plan: OutputPlan, model: str | Path | None) -> None:
    path = None if model is None else os.path.expanduser(model)
    if path is None or not os.path.exists(path):
        return  # a hub id
    source = Path(os.path.realpath(path))
    place = Path(os.path.realpath(plan.folder))
    inside = place == source or source in place.parents
    replaced = [Path(os.path.realpath(path)) for path in plan.products]
    if inside or any(path == source or path in source.parents for path in replaced):
        raise OutputRefused(
            "E-OUTPUT-IS-INPUT",
            f"the output {plan.target} would lie in the input model {model}",
            "give an --out outside the model's folder",
        )


def _check_writable(plan: OutputPlan) -> None:
    """Try it: permission bits do not tell of read-only mounts, and root passes them all."""
    folder = plan.folder if os.path.isdir(plan.folder) else plan.folder.parent
    probe = folder / f".blockpress-{uuid.uuid4().hex[:12]}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputRefused(
            "E-OUTPUT-NOT-WRITABLE",
            f"cannot write into {folder}: {error.strerror or error}",
            "give an --out in a folder that you can write",
        ) from None
