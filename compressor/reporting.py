"""What a run found out, put into the report's shape."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray

from compressor.block_result import PassResult
from compressor.evaluation import Evaluation
from compressor.finetuning import FINISHES
from compressor.quantization.writer import QuantizedModel
from compressor.report.schema import (
    BlockRow,
    CheckRow,
    EncodingBytes,
    FileRow,
    FinetuningRow,
    LearningRateFacts,
    LoadFacts,
    ManifestFacts,
    PerplexityFacts,
    QuantizationFacts,
    QuantizedBlockRow,
    TaskRow,
    TaskScore,
    ValidationFacts,
    WeightRow,
)
from compressor.run.output import OutputPlan
from exporters.encoding import summarize
from exporters.manifest import Manifest, TensorRow
from validators.checks import PERPLEXITY_KEYS, TaskResult, ValidationReport

_DISTRIBUTIONS = (
    "blockpress", "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "optimum", "safetensors", "tokenizers", "lm_eval",
)  # fmt: skip


@dataclass(frozen=True)
class MaskCount:
    """How much of one parameter is kept; ``shape`` is the mask's."""

    shape: tuple[int, ...]
    size: int
    kept: int


def count_masks(masks: Mapping[str, NDArray[np.bool_]]) -> dict[str, MaskCount]:
    """The count of each mask (True = kept) by parameter; one mask is in memory at a time."""
    return {name: MaskCount(mask.shape, mask.size, int(mask.sum())) for name, mask in masks.items()}


def count_shapes(passed: PassResult, blocks_name: str) -> dict[str, MaskCount]:
    """What is left of each prunable parameter, by full name, where heads or neurons were taken out; else nothing."""
    return {
        f"{blocks_name}.{block.index}.{name}": MaskCount(tuple(after), before.numel(), after.numel())
        for block in passed.blocks
        for name, (before, after) in block.shapes.items()
    }


def share_of_zeros(counts: Iterable[MaskCount]) -> float:
    """Zeros as a share of all masked weights, or what is gone as a share of what there was; 0 without masks."""
    counts = list(counts)
    size = sum(count.size for count in counts)
    return 1 - sum(count.kept for count in counts) / size if size else 0.0


def installed_versions() -> dict[str, str]:
    """Versions of Python, the platform and what takes part in the result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def validation_facts(report: ValidationReport | None) -> ValidationFacts:
    """Verdict and checks; without a validation the verdict is None."""
    if report is None:
        return ValidationFacts()
    return ValidationFacts(
        passed=report.passed,
        provider=report.provider,
        first_divergence=report.first_divergence,
        checks=tuple(
            CheckRow(
                name=c.name,
                status=c.status,
                measured=c.measured,
                limit=c.limit,
                unit=c.unit,
                why=c.why,
                details=dict(c.details),
            )
            for c in report.checks
        ),
    )


def task_rows(report: ValidationReport) -> tuple[TaskRow, ...]:
    """One row per metric of each task, with the scores of every model that it was run on."""
    found: dict[tuple[str, str], dict[str, TaskResult]] = {}
    for key, results in report.tasks.items():
        for result in results:
            found.setdefault((result.task, result.metric), {})[key] = result
    rows = []
    for (task, metric), by_model in found.items():
        first = next(iter(by_model.values()))
        scores = {key: TaskScore(value=one.value, stderr=one.stderr) for key, one in by_model.items()}
        rows.append(
            TaskRow(
                task=task,
                metric=metric,
                documents=first.documents,
                higher_is_better=first.higher_is_better,
                **scores,
            )
        )
    return tuple(rows)


def manifest_facts(manifest: Manifest) -> ManifestFacts:
    """The digest that names the manifest, and the hashes of the files."""
    rows = tuple(FileRow(name=f.name, sha256=f.sha256, size_bytes=f.size_bytes) for f in manifest.files)
    return ManifestFacts(digest=manifest.digest, files=rows)


def perplexity_facts(
    perplexities: Mapping[str, float | None], evaluation: Evaluation | None
) -> PerplexityFacts:
    """Perplexity by version of the model, as far as it was measured, and how it was."""
    measured = {key: perplexities.get(key) for key in PERPLEXITY_KEYS}
    return PerplexityFacts(**measured, protocol=None if evaluation is None else evaluation.facts())


def quantization_facts(quantized: QuantizedModel | None) -> QuantizationFacts | None:
    """How weights were quantised; None where they were not."""
    if quantized is None:
        return None
    return QuantizationFacts(
        bits=4 if quantized.bits == 4 else 8,
        group_size=quantized.group_size,
        activation_bits=8 if quantized.activation_bits == 8 else 32,
        blocks=tuple(QuantizedBlockRow(**asdict(block)) for block in quantized.blocks),
    )


def onnx_bytes(plan: OutputPlan) -> int:
    """Bytes of the graph and of its data file, where it has one."""
    return sum(path.stat().st_size for path in (plan.onnx, plan.data) if path.is_file())


def bytes_by_encoding(tensors: Iterable[TensorRow]) -> dict[str, EncodingBytes]:
    """Tensors, stored bytes and dense bytes of each encoding that is used."""
    totals: dict[str, list[int]] = {}
    for tensor in tensors:
        total = totals.setdefault(tensor.encoding, [0, 0, 0])
        for place, amount in enumerate((1, tensor.stored_bytes, tensor.bytes_by_encoding["dense"])):
            total[place] += amount
    return {
        encoding: EncodingBytes(tensors=count, bytes=stored, dense_bytes=dense)
        for encoding, (count, stored, dense) in totals.items()
    }


def block_rows(passed: PassResult) -> tuple[BlockRow, ...]:
    """Target, loss before and after, seconds and steps of each block."""
    return tuple(
        BlockRow(
            index=block.index,
            target_sparsity=block.target,
            loss_before=block.repaired.loss_before if block.repaired else None,
            loss_after=block.repaired.loss_after if block.repaired else None,
            seconds=block.elapsed_s,
            best_step=block.repaired.best_step if block.repaired else None,
            steps=block.repaired.steps if block.repaired else None,
            trained_parameters=block.repaired.trained_parameters if block.repaired else None,
        )
        for block in passed.blocks
    )


def finetuning_rows(passed: PassResult) -> tuple[FinetuningRow, ...]:
    """One row per end-to-end stage, in the order of the run."""
    return tuple(
        FinetuningRow(
            stage="finish" if tuned.method in FINISHES else "recovery",
            method=tuned.method,
            loss=tuned.loss,
            loss_before=tuned.loss_before,
            loss_after=tuned.loss_after,
            calibration_first=tuned.train_loss_first,
            calibration_last=tuned.train_loss_last,
            best_step=tuned.best_step,
            steps=tuned.steps,
            lr=tuned.lr,
            tried=tuned.tried,
            trained_parameters=tuned.trained_parameters,
            diverged=tuned.diverged,
            seconds=tuned.elapsed_s,
        )
        for tuned in passed.finetuned
    )


def weight_rows(
    counts: Mapping[str, MaskCount], blocks_name: str, tensors: Iterable[TensorRow]
) -> tuple[WeightRow, ...]:
    """One row per masked parameter: measured sparsity, and how it is stored. ``counts``: by full parameter name."""
    stored = {tensor.name: tensor for tensor in tensors}
    rows = []
    for name, count in counts.items():
        index, _, short = name.removeprefix(f"{blocks_name}.").partition(".")
        tensor = stored.get(name)
        rows.append(
            WeightRow(
                block=int(index),
                name=short,
                shape=count.shape,
                sparsity=share_of_zeros([count]),
                encoding=tensor.encoding if tensor else None,
                stored_bytes=tensor.stored_bytes if tensor else None,
                dense_bytes=tensor.bytes_by_encoding["dense"] if tensor else None,
            )
        )
    return tuple(rows)


def learning_rate_facts(passed: PassResult) -> LearningRateFacts | None:
    """The learning rate of the repair, None without one."""
    return None if passed.lr is None else LearningRateFacts(chosen=passed.lr, tried=passed.lr_tried)


def load_facts(manifest: Manifest | None, report: ValidationReport | None) -> LoadFacts:
    """What loading the file in ONNX Runtime costs; seconds and bytes only where the validator has loaded it."""
    timings = {} if report is None else report.timings
    resident = timings.get("load_rss_bytes")
    return LoadFacts(
        seconds=timings.get("load_s"),
        resident_bytes=None if resident is None else int(resident),
        note=None if manifest is None else summarize(manifest.tensors).load_note,
    )


def stage_seconds(report: ValidationReport | None) -> dict[str, float]:
    """The validator's own stages in seconds, as parts of the stage ``validate``."""
    timings = {} if report is None else report.timings
    return {f"validate: {name[:-2]}": value for name, value in timings.items() if name.endswith("_s")}
