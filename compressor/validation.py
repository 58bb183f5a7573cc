"""Validate an export: find what it can be compared with, cut the text, run the validator.

The validator itself (``validators``) knows files and limits; here is what it is given.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import InputRefused, ReportedError
from compressor.evaluation import Evaluation, evaluation_of, window_length
from compressor.models.checkpoint import open_checkpoint, open_tokenizer
from compressor.models.source import max_seqlen
from compressor.models.writer import MASKS_NAME
from compressor.progress import Notice, Progress, StageStarted, TextReady, silent
from compressor.recipe import EvaluationRecipe, GatesRecipe
from compressor.recipe_file import parse_recipe
from compressor.report.schema import Report, read_report
from compressor.run.output import OutputPlan, name_output
from compressor.task_options import check_task_options
from validators.checks import Gates, ValidationReport
from validators.request import DEFAULT_TIME_LIMIT_S, TaskRequest, ValidationRequest
from validators.session import check_provider
from validators.validate import check_required, validate

REFERENCE_FACTORY = "compressor.models.reference:load_reference"
TOKENIZER_FACTORY = "compressor.models.reference:load_tokenizer"

# Tasks are tens of thousands of runs of the model: two days guard against a hang, not against patience.
_TASKS_TIME_LIMIT_S = 24 * DEFAULT_TIME_LIMIT_S


@dataclass(frozen=True)
class ValidationOutcome:
    """A validation and what it rested on.

    Attributes:
        report: Checks, perplexities, verdict.
        plan: Where the export's files are.
        reference: The folder of the PyTorch model it was compared with, None without one.
        evaluation: The windows, None when no text was used.
        recorded: The report that lies beside the export, None without one.
        notices: What the user should know: which text, what was not found.
    """

    report: ValidationReport
    plan: OutputPlan
    reference: Path | None
    evaluation: Evaluation | None
    recorded: Report | None
    notices: tuple[str, ...]


def gates_of(recipe: GatesRecipe) -> Gates:
    """The validator's gates for a recipe's."""
    return Gates(**recipe.model_dump())


def validate_export(
    path: str | Path,
    *,
    reference: str | Path | None = None,
    dense: str | Path | None = None,
    evaluation: EvaluationRecipe | None = None,
    gates: GatesRecipe | None = None,
    require: Sequence[str] = (),
    structure_only: bool = False,
    lm_eval: bool = False,
    tasks: Sequence[str] = (),
    tasks_folder: str | Path | None = None,
    tasks_limit: int | None = None,
    provider: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> ValidationOutcome:
    """Validate an ONNX file: ours, with what lies beside it, or another tool's.

    Args:
        path: The ``.onnx`` file, or a folder that holds ``model.onnx``.
        reference: Folder of the PyTorch model; None takes the sibling ``.hf`` folder, if there is one.
        dense: The model before pruning, a folder or hub id; its perplexity is measured on the same windows.
        evaluation: The text. Where it sets no source, that is the one which the sibling report names if its
            hash still matches, else ``python-docs``.
        gates: Limits; None takes the defaults.
        require: Names of checks that fail when they cannot be made.
        structure_only: Judge the file by itself.
        lm_eval: Measure perplexity once more with lm-eval's own backend, if it is installed.
        tasks: Zero-shot tasks of lm-eval to run on the ONNX model and on the reference.
        tasks_folder: A folder of local tasks; code that their YAML files name is run.
        tasks_limit: Documents per task; None: all.
        provider: Execution provider of ONNX Runtime.
        trust_remote_code: Allow code that comes with the reference.
        progress: Receives events.

    Raises:
        ReportedError: The file is missing, broken, altered, or there is nothing to compare it with.
    """
    check_required(require)
    check_provider(provider)
    check_task_options(tasks, tasks_folder, tasks_limit)
    plan = _plan_of(Path(path))
    notices: list[str] = []

    def note(message: str) -> None:
        notices.append(message)
        progress(Notice(message))

    recorded = _recorded(plan, note)
    folder = _reference_folder(plan, reference, trust_remote_code)
    windows = None
    if not structure_only:
        windows = _windows(plan, folder, evaluation, recorded, trust_remote_code, note)
    if windows is not None:
        progress(TextReady("evaluation", windows.text.spec, len(windows.ids), windows.protocol.window_tokens))
    progress(StageStarted("validate"))
    known = _known(recorded, windows)
    # What the caller brings is measured, whatever the report says of the run's own models.
    if reference is not None:
        known.pop("recovered", None)
        known.pop("quantized", None)
        known.pop("pruned", None)
    if dense is not None:
        known.pop("dense", None)
    result = run_validator(
        plan,
        reference=folder,
        windows=windows,
        known=known,
        dense=None if dense is None else open_checkpoint(dense, trust_remote_code=trust_remote_code).folder,
        gates=gates or GatesRecipe(),
        require=require,
        structure_only=structure_only,
        lm_eval=lm_eval,
        tasks=_task_request(plan, folder, tasks, tasks_folder, tasks_limit, trust_remote_code),
        provider=provider,
        trust_remote_code=trust_remote_code,
    )
    return ValidationOutcome(result, plan, folder, windows, recorded, tuple(notices))


def run_validator(
    plan: OutputPlan,
    *,
    reference: Path | None,
    windows: Evaluation | None,
    known: Mapping[str, float | None],
    gates: GatesRecipe,
    dense: Path | None = None,
    require: Sequence[str] = (),
    structure_only: bool = False,
    lm_eval: bool = False,
    tasks: TaskRequest | None = None,
    provider: str = "auto",
    trust_remote_code: bool = False,
) -> ValidationReport:
    """The validator's report on the files that ``plan`` names; see ``validators.request`` for the rest."""
    with tempfile.TemporaryDirectory(prefix="blockpress-") as scratch:
        windows_path = None
        if windows is not None:
            windows_path = Path(scratch) / "windows.npy"
            np.save(windows_path, windows.ids)
        masks = next((path for path in _mask_places(plan, reference) if path.is_file()), None)
        request = ValidationRequest(
            model_path=str(plan.onnx),
            manifest_path=str(plan.manifest) if plan.manifest.is_file() else None,
            masks_path=None if masks is None else str(masks),
            reference_factory=None if reference is None else REFERENCE_FACTORY,
            reference_arguments={} if reference is None else _load_arguments(reference, trust_remote_code),
            windows_path=None if windows_path is None else str(windows_path),
            known_perplexity=dict(known),
            dense_factory=None if dense is None else REFERENCE_FACTORY,
            dense_arguments={} if dense is None else _load_arguments(dense, trust_remote_code),
            gates=gates_of(gates),
            require=tuple(require),
            structure_only=structure_only,
            lm_eval=lm_eval,
            tasks=tasks,
            provider=provider,
            time_limit_s=DEFAULT_TIME_LIMIT_S if tasks is None else _TASKS_TIME_LIMIT_S,
        )
        return validate(request)


def _load_arguments(folder: Path, trust_remote_code: bool) -> dict[str, object]:
    return {"folder": str(folder.resolve()), "trust_remote_code": trust_remote_code}


def _mask_places(plan: OutputPlan, reference: Path | None) -> tuple[Path, ...]:
    beside_reference = () if reference is None else (reference / MASKS_NAME,)
    return (*beside_reference, plan.masks)


def _plan_of(path: Path) -> OutputPlan:
    """The files that belong to an export; ``model.onnx`` in a folder has the layout of a folder output."""
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        path = path / "model.onnx"
    if not os.path.isfile(path):
        raise InputRefused(
            "E-ONNX-NOT-FOUND", f"there is no file {path}", "give the .onnx file, or the folder it lies in"
        )
    if path.suffix.lower() != ".onnx":
        raise InputRefused(
            "E-ONNX-NOT-FOUND", f"{path.name} is not an .onnx file", "give a file that ends in .onnx"
        )
    plan = name_output(path)
    if path.name == "model.onnx" and (path.parent / "config.json").is_file():
        return name_output(path.parent)
    return plan


def _recorded(plan: OutputPlan, note: Callable[[str], None]) -> Report | None:
    if not plan.report_json.is_file():
        return None
    try:
        return read_report(plan.report_json)
    except InputRefused as error:
        note(f"{plan.report_json.name} is not used: {error.message}")
        return None


def _reference_folder(plan: OutputPlan, reference: str | Path | None, trust_remote_code: bool) -> Path | None:
    if reference is not None:
        return open_checkpoint(reference, trust_remote_code=trust_remote_code).folder
    return plan.hf if plan.hf is not None and plan.hf.is_dir() else None


def _tokenizer_folder(plan: OutputPlan, reference: Path | None) -> Path | None:
    """The model folder at hand: the reference's, or the export's own."""
    places = (reference, plan.folder)
    return next((place for place in places if place and (place / "config.json").is_file()), None)


def _task_request(
    plan: OutputPlan,
    reference: Path | None,
    names: Sequence[str],
    tasks_folder: str | Path | None,
    limit: int | None,
    trust_remote_code: bool,
) -> TaskRequest | None:
    """What the validator is told of the tasks; None without any."""
    if not names:
        return None
    folder = _tokenizer_folder(plan, reference)
    if folder is None:
        raise InputRefused(
            "E-TASKS-TOKENIZER",
            "no model folder is at hand, so there is no tokenizer to run tasks with",
            "give --reference FOLDER",
        )
    _, config = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    return TaskRequest(
        names=tuple(names),
        tokenizer_factory=TOKENIZER_FACTORY,
        tokenizer_arguments=_load_arguments(folder, trust_remote_code),
        max_tokens=window_length(max_seqlen(config)),
        folder=None if tasks_folder is None else str(Path(tasks_folder).absolute()),
        limit=limit,
    )


def _windows(
    plan: OutputPlan,
    reference: Path | None,
    asked: EvaluationRecipe | None,
    recorded: Report | None,
    trust_remote_code: bool,
    note: Callable[[str], None],
) -> Evaluation | None:
    """Windows of the text that was asked for, of the one that the report names, or of ``python-docs``."""
    folder = _tokenizer_folder(plan, reference)
    if folder is None:
        note("no model folder is at hand, so there is no tokenizer: parity and perplexity are not measured")
        return None
    tokenizer, config = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    seqlen = window_length(max_seqlen(config))
    protocol = recorded.perplexity.protocol if recorded is not None else None
    if protocol is not None:
        seqlen = protocol.window
    given = {} if asked is None else asked.model_dump(include=asked.model_fields_set)

    def windows_of(recipe: EvaluationRecipe) -> Evaluation:
        return evaluation_of(recipe, tokenizer, seqlen, config.vocab_size)

    if asked is not None and "source" in given:
        return windows_of(asked)
    if recorded is not None and protocol is not None:
        settings = (recorded.recipe or {}).get("evaluation")
        told = {"source": protocol.source, "max_windows": protocol.windows, **given}
        if isinstance(settings, Mapping):
            told = {**settings, **told}
        found = _same_text(told, windows_of, protocol.sha256, note)
        if found is not None:
            return found
    windows = windows_of(EvaluationRecipe(**given))
    note("the evaluation text is python-docs")
    return windows


def _same_text(
    told: Mapping[str, Any],
    windows_of: Callable[[EvaluationRecipe], Evaluation],
    sha256: str | None,
    note: Callable[[str], None],
) -> Evaluation | None:
    """Windows of the text that a report tells of, where it is still the same."""
    try:
        recipe = parse_recipe({"evaluation": told}, origin="the report").evaluation
        windows = windows_of(recipe)
    except ReportedError as error:
        note(f"the report's evaluation text is not used ({error.message})")
        return None
    if windows.text.sha256 != sha256:
        note(f"the report's evaluation text {recipe.source} has changed since")
        return None
    note(f"the evaluation text is the report's: {recipe.source}")
    return windows


def _known(recorded: Report | None, windows: Evaluation | None) -> dict[str, float | None]:
    """Perplexities that the report holds for the very same windows."""
    if recorded is None or windows is None or recorded.perplexity.protocol is None:
        return {}
    before, now = recorded.perplexity.protocol, windows.facts()
    if (before.sha256, before.window, before.windows) != (now.sha256, now.window, now.windows):
        return {}
    return {
        name: getattr(recorded.perplexity, name) for name in ("dense", "pruned", "recovered", "quantized")
    }
