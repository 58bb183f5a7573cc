"""The report's data: what ``*.report.json`` holds, how it is written and read back.

Equal runs give equal reports but for ``timings``, ``peak_memory_bytes``, ``versions``, the seconds of blocks and
end-to-end stages.
JSON has no NaN and no infinity: such a number is written as ``null``, and the top-level key ``nonfinite``
says where it stood (JSON Pointer, RFC 6901) and what it was, so that ``null`` alone means "not measured".
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from compressor.errors import InputRefused
from compressor.report.nonfinite import finite_tree, restore_numbers

SCHEMA_VERSION = 1

STATEMENT = (
    "Smaller on disk, not faster: stock ONNX Runtime expands sparse initializers to dense tensors when it "
    "loads the file, so run time and memory in use are those of the dense model."
)
PACKED_STATEMENT = (
    "Smaller on disk and in memory: packed weights stay packed. ONNX Runtime multiplies by them as they lie where the "
    "blockpress-runtime library is registered; without it, it runs a function in the file that unpacks them in every "
    "call, which is correct and slow."
)
STRUCTURED_STATEMENT = (
    "Smaller on disk and in memory, and fewer operations: heads and neurons are gone, not set to zero, so that "
    "stock ONNX Runtime computes with smaller dense matrices."
)

_MAX_REPORT_BYTES = 256 * 2**20


def portable_name(source: str) -> str:
    """``source`` without this machine's folders: the last part of an absolute path, anything else as it is.

    Hub ids, built-in names and relative paths stay whole: ``validate`` can find a relative text again.
    """
    if source.startswith("~") or PurePosixPath(source).is_absolute():
        return PurePosixPath(source).name or "."
    if PureWindowsPath(source).is_absolute():
        return PureWindowsPath(source).name or "."
    return source


PortableName = Annotated[str, AfterValidator(portable_name)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelFacts(_Part):
    """The model that went in. ``parameters`` counts tied weights once."""

    name: PortableName
    architecture: str | None = None
    revision: str | None = None
    parameters: int | None = None
    checkpoint_dtype: str | None = None
    export_dtype: str | None = None


class SparsityFacts(_Part):
    """Share of zeros in the pruned weights: asked for, and counted. ``pattern`` is ``"2:4"``-like or None.

    Where heads and neurons were taken out (``structured``), the share of the blocks' prunable weights that are
    gone; then no weight is zero.
    """

    target: float | None = None
    measured: float | None = None
    pattern: str | None = None
    structured: bool = False


class PerplexityProtocol(_Part):
    """How perplexity was measured: exp of the mean nats per predicted token over ``windows`` windows."""

    source: PortableName
    sha256: str | None = None
    window: Annotated[int, Field(ge=2)]
    stride: int
    windows: int
    tokens: int
    bos: str | bool | None = None
    join: str | None = None
    dtype: str | None = None
    dropped_tokens: int | None = None


class PerplexityFacts(_Part):
    """Perplexity of the model's versions on the same windows; None where it was not measured.

    What sparsity costs stands between ``dense`` and ``recovered``, what int8 or int4 costs between ``recovered`` and
    ``quantized``; without quantisation that is None.
    """

    dense: float | None = None
    pruned: float | None = None
    recovered: float | None = None
    quantized: float | None = None
    onnx: float | None = None
    protocol: PerplexityProtocol | None = None


class QuantizedBlockRow(_Part):
    """How much quantisation changed one block's outputs on calibration windows: mean squared, relative to them.

    ``nearest_error`` is that of steps which reach the largest weights; ``searched`` whether better ones were found.
    """

    index: int
    error: float | None = None
    nearest_error: float | None = None
    searched: bool = False


class QuantizationFacts(_Part):
    """How kept weights were rounded; head and embeddings are int8 with a scale per token."""

    bits: Literal[4, 8]
    group_size: int
    activation_bits: Literal[8, 32]
    blocks: tuple[QuantizedBlockRow, ...] = ()


class CalibrationFacts(_Part):
    """The text that pruning statistics and repair saw, and how it was cut."""

    source: PortableName
    sha256: str | None = None
    protocol: dict[str, Any] = {}


class CheckRow(_Part):
    """One check of the validator. ``why`` says what went wrong, why it was skipped, or what a pass rests on.

    ``details`` are further figures by name, such as a parity check's top-1 agreement.
    """

    name: str
    status: Literal["passed", "failed", "skipped"]
    measured: int | float | str | None = None
    limit: int | float | str | None = None
    unit: str | None = None
    why: str | None = None
    details: dict[str, float] = {}


class ValidationFacts(_Part):
    """The verdict and the checks it rests on; ``passed`` is None when nothing was validated."""

    passed: bool | None = None
    provider: str | None = None
    first_divergence: str | None = None
    checks: tuple[CheckRow, ...] = ()

    @model_validator(mode="after")
    def _verdict_follows_checks(self) -> ValidationFacts:
        statuses = [check.status for check in self.checks]
        if self.passed and ("failed" in statuses or "passed" not in statuses):
            raise ValueError("passed needs at least one passed check and no failed one")
        if self.passed is None and "failed" in statuses:
            raise ValueError("a failed check needs a verdict")
        return self


class TaskScore(_Part):
    """What one model scored; ``stderr`` is the standard error, None where lm-eval gives none."""

    value: float
    stderr: float | None = None


class TaskRow(_Part):
    """One metric of one zero-shot task of lm-eval, on the ONNX model and on the PyTorch sparse model."""

    task: str
    metric: str
    documents: int
    higher_is_better: bool | None = None
    onnx: TaskScore | None = None
    recovered: TaskScore | None = None
    quantized: TaskScore | None = None


class EncodingBytes(_Part):
    """What one encoding holds: tensors, bytes in the files, bytes that the same tensors take dense."""

    tensors: int
    bytes: int
    dense_bytes: int


class SizeFacts(_Part):
    """Sizes in bytes. ``dense_bytes`` is unique parameters times the exported dtype's size."""

    source_bytes: int | None = None
    dense_bytes: int | None = None
    onnx_bytes: int | None = None
    by_encoding: dict[str, EncodingBytes] = {}


class LoadFacts(_Part):
    """What loading the file in ONNX Runtime cost the validator: wall seconds, growth of resident memory."""

    seconds: float | None = None
    resident_bytes: int | None = None
    note: str | None = None


class WeightRow(_Part):
    """One pruned weight. ``name`` is unique in its block; ``name[3]`` is expert 3 of a fused parameter.

    ``shape`` is PyTorch's; the ONNX graph may store the transposed matrix. Of a structured pruning it is what is
    left, and ``sparsity`` is the share of the matrix that went.
    """

    block: int
    name: str
    shape: tuple[int, ...]
    sparsity: float
    encoding: str | None = None
    stored_bytes: int | None = None
    dense_bytes: int | None = None


class BlockRow(_Part):
    """One decoder block: held-out mean squared error of its output before and after the repair.

    ``target_sparsity`` is None where it is the whole model's.
    """

    index: int
    target_sparsity: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float | None = None
    best_step: int | None = None
    steps: int | None = None
    trained_parameters: int | None = None


class FinetuningRow(_Part):
    """One end-to-end stage over all blocks: ``recovery`` or ``finish``.

    ``loss`` names what was minimised (``kl``, ``ce``, ``ce + squarehead``; nats per token, SquareHead a sum over
    layers). ``loss_before`` and ``loss_after`` are it on held-out windows, ``calibration_first`` and ``_last`` on
    the calibration windows of the first and the last epoch. ``tried`` is empty where the learning rate was given.
    """

    stage: Literal["recovery", "finish"]
    method: str
    loss: str
    loss_before: float
    loss_after: float
    calibration_first: float | None = None
    calibration_last: float | None = None
    best_step: int
    steps: int
    lr: float
    tried: tuple[float, ...] = ()
    trained_parameters: int
    diverged: bool = False
    seconds: float


class LearningRateFacts(_Part):
    """The learning rate used, and the candidates that the probe tried (none: it was given)."""

    chosen: float
    tried: tuple[float, ...] = ()


class PeakMemory(_Part):
    """Highest memory use seen, in bytes; ``device`` is None without an accelerator."""

    host: int | None = None
    device: int | None = None


class FileRow(_Part):
    """One model file as the manifest lists it."""

    name: str
    sha256: str
    size_bytes: int


class ManifestFacts(_Part):
    """The manifest's digest and the files it covers."""

    digest: str
    files: tuple[FileRow, ...] = ()


class Report(_Part):
    """Everything that a run, an export or a validation found out. Field order is the JSON's key order.

    ``timings`` are seconds by stage; a name such as ``validate: parity`` is a part of stage ``validate``. Equal
    ``run_sha256`` means equal model, windows, settings, kind of device and versions, and so equal model files.
    """

    schema_version: Literal[1] = 1
    command: Literal["run", "export", "validate"]
    output: PortableName
    model: ModelFacts
    sparsity: SparsityFacts = SparsityFacts()
    perplexity: PerplexityFacts = PerplexityFacts()
    calibration: CalibrationFacts | None = None
    validation: ValidationFacts = ValidationFacts()
    tasks: tuple[TaskRow, ...] = ()
    quantization: QuantizationFacts | None = None
    size: SizeFacts = SizeFacts()
    load: LoadFacts = LoadFacts()
    weights: tuple[WeightRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    recovery: str | None = None
    learning_rate: LearningRateFacts | None = None
    finetuning: tuple[FinetuningRow, ...] = ()
    recipe: dict[str, Any] | None = None
    device: str | None = None
    versions: dict[str, str] = {}
    timings: dict[str, float] = {}
    peak_memory_bytes: PeakMemory = PeakMemory()
    manifest: ManifestFacts | None = None
    run_sha256: str | None = None
    notices: tuple[str, ...] = ()
    statement: str = STATEMENT

    @field_validator("recipe")
    @classmethod
    def _portable_sources(cls, recipe: dict[str, Any] | None) -> dict[str, Any] | None:
        if recipe is None:
            return None
        return {section: _with_portable_source(settings) for section, settings in recipe.items()}

    def tree(self) -> dict[str, Any]:
        """The report as JSON-ready dicts and lists, with ``nonfinite`` as its last key."""
        tree, nonfinite = finite_tree(self.model_dump())
        return {**tree, "nonfinite": nonfinite}

    def to_json(self) -> str:
        """The report as indented JSON, valid by RFC 8259 whatever was measured."""
        return json.dumps(self.tree(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Report:
        """The report that :meth:`tree` turned into dicts and lists, non-finite numbers restored.

        Raises:
            ValueError: A key is unknown or missing, a value has the wrong type, or ``nonfinite`` is off.
        """
        fields = copy.deepcopy(dict(tree))
        nonfinite = fields.pop("nonfinite", {})
        restore_numbers(fields, nonfinite)
        return cls.model_validate(fields)


def read_report(path: str | Path) -> Report:
    """The report of a ``*.report.json`` file.

    Raises:
        InputRefused: The file is absent, no report, or of another schema version.
    """
    path = Path(path)
    remedy = "give the .report.json that compress wrote, or run compress validate again"
    try:
        if path.stat().st_size > _MAX_REPORT_BYTES:
            raise InputRefused("E-REPORT-UNREADABLE", f"{path.name} is larger than a report can be", remedy)
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputRefused(
            "E-REPORT-UNREADABLE", f"{path.name} cannot be read as JSON ({error})", remedy
        ) from None
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        raise InputRefused(
            "E-REPORT-SCHEMA",
            f"{path.name} has report schema {version}; this version reads {SCHEMA_VERSION}",
            remedy,
        )
    try:
        return Report.from_tree(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputRefused("E-REPORT-UNREADABLE", f"{path.name}: {place}: {first['msg']}", remedy) from None
    except (ValueError, RecursionError) as error:
        raise InputRefused("E-REPORT-UNREADABLE", f"{path.name}: {error}", remedy) from None


def _with_portable_source(settings: Any) -> Any:
    if isinstance(settings, Mapping) and isinstance(settings.get("source"), str):
        return {**settings, "source": portable_name(settings["source"])}
    return settings
