"""One examination from the file's hashes to its perplexity, in the order in which trust grows.

Nothing is opened before its hash is right, nothing is run before its structure is. The ONNX session and the
PyTorch models are never in memory together: the logits of the few parity sequences are kept instead.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exporters.file_graph import FileGraph
from validators.causal_lm import CausalLM
from validators.checks import (
    PERPLEXITY_KEYS,
    ROUNDED,
    TOLERANCES,
    Check,
    TaskResult,
    Tolerance,
    ValidationReport,
    complete,
    skipped,
)
from validators.errors import ValidationError, ValidationUsageError
from validators.events import OnProgress, ValidationProgress, ignore
from validators.gates import drift_check, implied_requirements, increase_check
from validators.harness import CHECK_NAME as HARNESS_CHECK
from validators.harness import agreement_check
from validators.integrity import check_unchanged
from validators.parity import (
    LanguageModel,
    ParityCase,
    first_divergence,
    judge,
    parity_cases,
    run_onnx,
    run_reference,
)
from validators.reference import Floats, Ids, Reference
from validators.request import ValidationRequest
from validators.room import blocks_of
from validators.session import Session, packed_runtime
from validators.streamed import Sequences, StreamedLM, StreamedWindows
from validators.structure import Structure, examine_structure
from validators.tasks import LoadedTasks, evaluate_tasks, load_tasks

FALLBACK_CHECK, FALLBACK_TOKENS = "packed-fallback", 32
_PARITY_NAMES = ("parity-prefill", "parity-decode", "parity-padded")


def examine(request: ValidationRequest, on_progress: OnProgress = ignore) -> ValidationReport:
    """What an examination of the file finds, made in this process.

    Raises:
        ReportedError: The file is altered, broken, or not what can be examined; memory ran out.
    """
    work = _Examination(request, on_progress)
    structure = work.structure()
    if request.structure_only:
        work.load(structure)
        work.skip_running("only the structure was asked for")
    else:
        work.load_tasks()
        runs = work.run_onnx(structure)
        work.cross_check(structure)
        failed = work.compare(runs)
        if failed is not None:
            work.locate(structure, failed)
        work.measure_dense()
        work.judge_perplexity()
    check_unchanged(structure.watched)
    return work.report()


@dataclass
class _Runs:
    """What the ONNX model gave: logits by parity case."""

    logits: list[tuple[ParityCase, Floats]]


@dataclass
class _Failed:
    """The first parity case that failed, with the reference's block outputs on it."""

    case: ParityCase
    block_outputs: list[Floats]


@dataclass
class _Examination:
    """What has been found so far."""

    request: ValidationRequest
    on_progress: OnProgress
    checks: list[Check] = field(default_factory=list)
    perplexity: dict[str, float | None] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    provider: str | None = None
    compute_dtype: str | None = None
    first_divergence: str | None = None
    tasks: dict[str, tuple[TaskResult, ...]] = field(default_factory=dict)
    _loaded_tasks: LoadedTasks | None = field(default=None, init=False)
    _graph: FileGraph | None = field(default=None, init=False)  # where it runs block by block
    _library: bool = field(default=False, init=False)  # whether its operators run, not the file's functions
    _rounds_inputs: bool = field(default=False, init=False)
    _reference_key: str = field(default="recovered", init=False)  # the version that the file was made of

    def __post_init__(self) -> None:
        self.perplexity = {key: self.request.known_perplexity.get(key) for key in PERPLEXITY_KEYS}
        self.perplexity["onnx"] = None  # what this examination is to measure

    def structure(self) -> Structure:
        """The file judged by itself."""
        with self._stage("structure"):
            structure = examine_structure(self.request, self.on_progress)
        self.checks.extend(structure.checks)
        self._rounds_inputs = structure.rounds_inputs
        self._reference_key = "quantized" if structure.quantized else "recovered"
        return structure

    def load(self, structure: Structure) -> Session:
        """The file loaded, its cost noted."""
        if structure.own_operators:
            lacking = packed_runtime()
            self._library = lacking is None
            if lacking is not None:
                self.notices.append(f"everything ran with the fallback in the file: {lacking}")
        with self._stage("load"):
            session = Session(structure.model_path, self.request.provider, library=self._library)
        self.timings["load_s"] = session.load_s
        self.timings["load_rss_bytes"] = float(session.load_rss_bytes)
        self.provider = session.provider
        self.notices.extend(session.notices)
        return session

    def load_tasks(self) -> None:
        """Read the documents of the tasks, if any: what is wrong with them is said before any model runs."""
        asked = self.request.tasks
        if asked is not None:
            with self._stage("tasks"):
                self._loaded_tasks = load_tasks(asked.names, asked.folder)

    def run_onnx(self, structure: Structure) -> _Runs:
        """Parity logits, perplexity and task results of the ONNX model; closed again afterwards."""
        self._graph, why = blocks_of(structure, self.request)
        if why is not None:
            self.notices.append(why)
        if self._graph is not None:
            return self._run_blocks(
                StreamedLM(structure.model_path, self._graph, self.request.provider), structure
            )
        model = CausalLM(self.load(structure))
        self.compute_dtype = model.compute_dtype(structure.stored_dtype)
        runs = _Runs(self._parity_logits(model))
        windows = self._windows(self.request.windows_path)
        if windows is not None:
            with self._stage("perplexity"):
                self.perplexity["onnx"] = self._perplexity(model.logits, windows, "perplexity")
        self._run_tasks("onnx", model)
        compared = self._fallback_case(structure, model)
        del model
        gc.collect()
        if compared is not None:
            self._compare_fallback(structure, *compared)
        return runs

    def _run_blocks(self, model: StreamedLM, structure: Structure) -> _Runs:
        """Parity logits and perplexity with one block in memory at a time."""
        self.compute_dtype = model.compute_dtype(structure.stored_dtype)
        cases = self._cases(model)
        with self._stage("parity"):
            logits = model.logits_of(
                [Sequences(case.ids, case.attention_mask, case.prefix) for case in cases],
                lambda done, total: self.on_progress(ValidationProgress("parity", done, total)),
            )
        windows = self._windows(self.request.windows_path)
        if windows is not None:
            with self._stage("perplexity"):
                streamed = StreamedWindows(model, windows)
                self.perplexity["onnx"] = self._perplexity(streamed.logits, windows, "perplexity")
        self.provider = model.provider
        self.notices.extend(model.notices)
        return _Runs(list(zip(cases, logits, strict=True)))

    def _fallback_case(self, structure: Structure, model: CausalLM) -> tuple[ParityCase, Floats] | None:
        """A few tokens and the logits that the library gives; a skipped check where there is nothing to compare."""
        if not structure.own_operators and FALLBACK_CHECK not in self.request.require:
            return None
        windows = self._windows(self.request.parity_ids_path or self.request.windows_path)
        why = {
            "there are no operators of the library in it": not structure.own_operators,
            "the library is not here, so that all checks are of the fallback": not self._library,
            "no text was given": windows is None,
        }
        for reason, holds in why.items():
            if holds:
                self.checks.append(skipped(FALLBACK_CHECK, reason))
                return None
        assert windows is not None
        case = ParityCase(FALLBACK_CHECK, windows[:1, :FALLBACK_TOKENS])
        return case, run_onnx(model, case)

    def _compare_fallback(self, structure: Structure, case: ParityCase, expected: Floats) -> None:
        """Judge what stock ONNX Runtime computes with the function in the file by what the library gives."""
        with self._stage("fallback"):
            model = CausalLM(Session(structure.model_path, self.request.provider))
            found = run_onnx(model, case)
        self.checks.append(judge(case, expected, found, self._tolerance, self.request.gates))

    def cross_check(self, structure: Structure) -> None:
        """Compare the ONNX perplexity with lm-eval's, where that is asked for."""
        if not self._asks_harness:
            return
        if self._graph is not None:
            self.checks.append(
                skipped(HARNESS_CHECK, "lm-eval loads the whole model, which ran block by block")
            )
            return
        windows = self._windows(self.request.windows_path)
        with self._stage("lm-eval"):
            check = agreement_check(
                structure.model_path, windows, self.perplexity["onnx"], self.provider or "", self.on_progress
            )
        self.checks.append(check)

    def compare(self, runs: _Runs) -> _Failed | None:
        """Judge parity, and measure the reference's perplexity where it is not known."""
        windows = self._windows(self.request.windows_path)
        key = self._reference_key
        measure = windows is not None and self.perplexity[key] is None
        wanted = bool(runs.logits) or measure or self._loaded_tasks is not None
        if self.request.reference_factory is None or not wanted:
            return None
        failed = None
        with self._stage("reference"):
            reference: Reference = _make(self.request.reference_factory, self.request.reference_arguments)
            for case, found in runs.logits:
                check = judge(
                    case, run_reference(reference, case), found, self._tolerance, self.request.gates
                )
                self.checks.append(check)
                if check.status == "failed" and failed is None:
                    failed = _Failed(case, reference.block_outputs(case.ids, case.attention_mask))
            if windows is not None and measure:
                self.perplexity[key] = self._perplexity(reference.logits, windows, "reference")
        self._run_tasks(key, reference)
        del reference
        gc.collect()
        return failed

    def locate(self, structure: Structure, failed: _Failed) -> None:
        """Name the block at which the graph first leaves the reference."""
        names = structure.block_outputs
        if len(names) != len(failed.block_outputs):
            counts = f"{len(names)} block outputs, the reference has {len(failed.block_outputs)}"
            self.first_divergence = f"not located: the manifest names {counts}"
            return
        with self._stage("divergence"):
            try:
                model: LanguageModel
                if self._graph is not None:
                    model = StreamedLM(structure.model_path, self._graph, self.request.provider)
                else:
                    session = Session(
                        structure.model_path, self.request.provider, names, library=self._library
                    )
                    model = CausalLM(session)
                self.first_divergence = first_divergence(
                    model, failed.case, failed.block_outputs, names, self._tolerance
                )
            except ValidationError as error:
                # The failed check stands with or without its place.
                self.first_divergence = f"not located: {error}"

    def measure_dense(self) -> None:
        """Measure the dense model's perplexity where it is not known and a model is given."""
        windows = self._windows(self.request.windows_path)
        if self.request.dense_factory is None or windows is None or self.perplexity["dense"] is not None:
            return
        with self._stage("dense"):
            dense: Reference = _make(self.request.dense_factory, self.request.dense_arguments)
            self.perplexity["dense"] = self._perplexity(dense.logits, windows, "dense")
            del dense
            gc.collect()

    def judge_perplexity(self) -> None:
        """The two checks on perplexity."""
        drift = drift_check(self.perplexity, self._tolerance, self.request.gates, self._reference_key)
        self.checks.append(drift)
        self.checks.append(increase_check(self.perplexity, self.request.gates))

    def skip_running(self, why: str) -> None:
        """Skip every check that runs the model."""
        asked = (HARNESS_CHECK,) if self._asks_harness else ()
        for name in (*_PARITY_NAMES, "perplexity-drift", "perplexity-increase", *asked):
            self.checks.append(skipped(name, why))

    def report(self) -> ValidationReport:
        """All that was found."""
        required = {*self.request.require, *implied_requirements(self.request.gates)}
        return ValidationReport(
            checks=complete(self.checks, required),
            perplexity=self.perplexity,
            provider=self.provider,
            compute_dtype=self.compute_dtype,
            first_divergence=self.first_divergence,
            timings=self.timings,
            notices=tuple(self.notices),
            tasks=self.tasks,
        )

    @property
    def _asks_harness(self) -> bool:
        return self.request.lm_eval or HARNESS_CHECK in self.request.require

    @property
    def _tolerance(self) -> Tolerance:
        return TOLERANCES[ROUNDED if self._rounds_inputs else self.compute_dtype or "float32"]

    def _cases(self, model: LanguageModel) -> list[ParityCase]:
        """The parity cases; what cannot be compared becomes a skipped check."""
        windows = self._windows(self.request.parity_ids_path or self.request.windows_path)
        why = "no reference was given" if self.request.reference_factory is None else "no text was given"
        if windows is None or self.request.reference_factory is None:
            self.checks.extend(skipped(name, why) for name in _PARITY_NAMES)
            return []
        cases, impossible = parity_cases(windows, model)
        self.checks.extend(impossible)
        return cases

    def _parity_logits(self, model: CausalLM) -> list[tuple[ParityCase, Floats]]:
        """Each parity case with the ONNX model's logits."""
        cases, logits = self._cases(model), []
        if not cases:
            return []
        with self._stage("parity"):
            for done, case in enumerate(cases, start=1):
                logits.append((case, run_onnx(model, case)))
                self.on_progress(ValidationProgress("parity", done, len(cases)))
        return logits

    def _run_tasks(self, key: str, model: CausalLM | Reference) -> None:
        """Note what the tasks, if any, give on this model, under ``key`` of ``PERPLEXITY_KEYS``."""
        asked = self.request.tasks
        if asked is None or self._loaded_tasks is None:
            return
        stage = f"tasks-{key}"

        def on_request(done: int, total: int) -> None:
            self.on_progress(ValidationProgress(stage, done, total))

        with self._stage(stage):
            self.tasks[key] = evaluate_tasks(
                model,
                _make(asked.tokenizer_factory, asked.tokenizer_arguments),
                self._loaded_tasks,
                limit=asked.limit,
                max_tokens=asked.max_tokens,
                on_request=on_request,
            )

    def _perplexity(self, logits_of: Any, windows: Ids, stage: str) -> float:
        from validators.perplexity import measure_perplexity  # it imports torch, after the load was measured

        def on_window(done: int, total: int) -> None:
            self.on_progress(ValidationProgress(stage, done, total))

        return measure_perplexity(logits_of, windows, on_window)

    def _windows(self, path: str | None) -> Ids | None:
        return None if path is None else read_windows(Path(path))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Tell that a stage begins, and note its seconds under ``<name>_s`` of the timings."""
        self.on_progress(ValidationProgress(name))
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[f"{name}_s"] = time.perf_counter() - started


def read_windows(path: Path) -> Ids:
    """Token windows (N, T) int64 from a ``.npy`` file.

    Raises:
        ValidationUsageError: E-VALIDATE-WINDOWS: the file holds something else.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _windows_error(path, str(error)) from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype != np.int64:
        raise _windows_error(path, f"{getattr(ids, 'dtype', '?')} of shape {getattr(ids, 'shape', '?')}")
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise _windows_error(path, f"shape {ids.shape}: no window of at least 2 tokens")
    return ids


def _make(factory: str, arguments: Mapping[str, Any]) -> Any:
    """The model or tokenizer that the "module:function" returns."""
    module, _, function = factory.partition(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def _windows_error(path: Path, what: str) -> ValidationUsageError:
    return ValidationUsageError(
        "E-VALIDATE-WINDOWS",
        f"{path}: expected token windows, int64 (windows, tokens): {what}",
        "write them with numpy.save from evaluation_windows(...).ids",
    )
