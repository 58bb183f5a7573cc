"""Speed and memory of ONNX models side by side, with the dense rivals made from the first of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import OutputRefused, UsageError
from compressor.progress import Progress, StageStarted, TaskProgress, silent
from compressor.speed.machine import machine_facts
from exporters.densify import densify, has_transposed_weights
from exporters.read import OnnxFile, read_model
from validators.speed.contents import Contents, contents_of
from validators.speed.measure import check_workload, measure
from validators.speed.process import WorkerProcess
from validators.speed.results import Speed
from validators.speed.workload import Workload

FORMS = ("float32", "int8", "int4")


@dataclass(frozen=True)
class BenchResult:
    """A measurement, and the machine and versions that it belongs to."""

    speed: Speed
    machine: dict[str, Any]

    def tree(self) -> dict[str, Any]:
        """All of it as values that JSON has."""
        return {**self.speed.tree(), "machine": self.machine}


def bench(
    models: Sequence[str],
    baselines: Sequence[str] = (),
    *,
    make: Sequence[str] = FORMS,
    workload: Workload,
    keep_baselines: str | Path | None = None,
    require_library: bool = False,
    progress: Progress = silent,
) -> BenchResult:
    """Measure ``models`` against ``baselines``.

    Args:
        models: ``.onnx`` files, folders with ``model.onnx``, or either behind ``NAME=``. Without a name a model is
            called by the form of its weights: "sparse-int8".
        baselines: The same, of dense rivals.
        make: Forms of dense rivals to make from the first model, unless one of that form is there already: "float32",
            "int8" (ONNX Runtime's dynamic quantisation), "int4" (its MatMulNBits).
        workload: What to measure.
        keep_baselines: The folder in which made baselines stay; None: they are removed at the end.
        require_library: Refuse to run packed weights without the operator library.
        progress: Receives events.

    Raises:
        UsageError: E-BENCH-NAME.
        ReportedError: What reading, quantising and measuring refuse, with their own ids and exit codes.
    """
    check_workload(workload)
    opened = _open(models, {})
    rivals = _open(baselines, opened)
    contents = {name: contents_of(file) for name, file in {**opened, **rivals}.items()}
    forms = {one.form for one in contents.values()}
    missing = [form for form in FORMS if form in make and f"dense-{form}" not in forms]
    with _baseline_folder(keep_baselines) as folder:
        made = _make(next(iter(opened.values())), missing, folder, progress)
        contents |= made
        progress(StageStarted("measure", f"{', '.join(contents)}: {workload.rounds} rounds in turns"))
        speed = measure(
            contents,
            [*rivals, *made],
            workload,
            require_library=require_library,
            progress=lambda _, done, total: progress(TaskProgress(done, total)),
        )
    return BenchResult(speed, machine_facts())


def _open(given: Sequence[str], taken: dict[str, OnnxFile]) -> dict[str, OnnxFile]:
    """The files that were given, by name."""
    found: dict[str, OnnxFile] = {}
    for text in given:
        name, path = _split(text)
        file = read_model(path / "model.onnx" if os.path.isdir(path) else path)
        name = name or _free_name(contents_of(file), {**taken, **found})
        if name in taken or name in found:
            raise UsageError("E-BENCH-NAME", f"two models are called {name}", "give each a NAME= of its own")
        found[name] = file
    return found


def _split(text: str) -> tuple[str, Path]:
    """Name and path of ``NAME=PATH``; no name where the whole text is a path."""
    name, sign, path = text.partition("=")
    if not sign or os.path.exists(text):
        return "", Path(text)
    return name, Path(path)


def _free_name(contents: Contents, taken: dict[str, OnnxFile]) -> str:
    """A name after the form of the weights, with the file's where that is taken, with a number where both are."""
    stem = contents.path.parent.name if contents.path.name == "model.onnx" else contents.path.stem
    names = [contents.form, f"{contents.form} {stem}"]
    names += [f"{names[1]} {number}" for number in range(2, len(taken) + 3)]
    return next(name for name in names if name not in taken)


@contextmanager
def _baseline_folder(keep: str | Path | None) -> Iterator[Path]:
    """The folder for baselines that are made: the one to keep them in, or one that goes away."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="blockpress-bench-") as scratch:
            yield Path(scratch)
        return
    folder = Path(keep)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputRefused(
            "E-OUTPUT-NOT-WRITABLE",
            f"cannot write {folder}: {error.strerror or error}",
            "give a --keep-baselines that you can write",
        ) from None
    yield folder


def _make(model: OnnxFile, forms: Sequence[str], folder: Path, progress: Progress) -> dict[str, Contents]:
    """Dense rivals of these forms, made from ``model``."""
    if not forms:
        return {}
    name = model.path.parent.name if model.path.name == "model.onnx" else model.path.stem
    dense, source = folder / f"{name}.float32.onnx", folder / f"{name}.float32.onnx"
    progress(StageStarted("baseline", "dense-float32"))
    densify(model, dense)
    quantised = [form for form in forms if form != "float32"]
    if quantised and has_transposed_weights(read_model(dense)):
        # A product by a transposed weight is passed over by both tools. The float32 rival does without this copy:
        # ONNX Runtime transposes at load, and a tied head is then no second matrix in the file.
        source = folder / f"{name}.untied.onnx"
        densify(model, source, fold_transposes=True)
    made = {}
    for form in forms:
        path = dense
        if form != "float32":
            progress(StageStarted("baseline", f"dense-{form}"))
            path = folder / f"{name}.{form}.onnx"
            with WorkerProcess(f"dense-{form}") as worker:
                worker.ask("quantise", form=form, source=str(source.absolute()), target=str(path.absolute()))
        made[f"dense-{form}"] = contents_of(read_model(path))
    for path in {source, dense} - {one.path for one in made.values()}:
        path.unlink()
        path.with_name(f"{path.name}.data").unlink()
    return made
