"""The last part of every run: ONNX file, manifest, validation, report, publication."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.block_result import PassResult
from compressor.evaluation import Evaluation
from compressor.models.config_file import read_json_object
from compressor.models.export_view import export_parts
from compressor.models.structure import plain_type
from compressor.models.writer import CONFIG_NAME, MASKS_NAME, write_json
from compressor.opening import Subject
from compressor.progress import Notice, Progress, StageStarted
from compressor.quantization.writer import QuantizedModel
from compressor.recipe import Recipe
from compressor.report.html import write_report
from compressor.report.schema import (
    PACKED_STATEMENT,
    STATEMENT,
    STRUCTURED_STATEMENT,
    CalibrationFacts,
    PeakMemory,
    Report,
    SizeFacts,
    SparsityFacts,
)
from compressor.reporting import (
    MaskCount,
    block_rows,
    bytes_by_encoding,
    count_masks,
    count_shapes,
    finetuning_rows,
    installed_versions,
    learning_rate_facts,
    load_facts,
    manifest_facts,
    onnx_bytes,
    perplexity_facts,
    quantization_facts,
    share_of_zeros,
    stage_seconds,
    validation_facts,
    weight_rows,
)
from compressor.run.faults import reach
from compressor.run.measure import Measure, peak_device_bytes, peak_host_bytes
from compressor.run.output import OutputPlan
from compressor.run.publish import Staging
from compressor.validation import run_validator
from exporters.block_check import check_blocks
from exporters.causal_lm import BlockGraph, build_graph
from exporters.manifest import Manifest, hash_files, write_manifest
from exporters.masks import read_masks
from exporters.packed_graph import PackedGraph, pack_graph
from exporters.quantized import SCALES_NAME, read_quantization
from exporters.wire import write_model
from validators.checks import ValidationReport

_NAMED = 3  # weights that a notice names


@dataclass(frozen=True)
class CompressionResult:
    """What a run left behind.

    Attributes:
        out: The ONNX file.
        report: Content of the report, as in ``*.report.json``.
        report_path: The report for machines.
        html_path: The report for people.
        passed: The validator's verdict; None when it was not asked.
    """

    out: Path
    report: dict[str, Any]
    report_path: Path
    html_path: Path
    passed: bool | None


@dataclass(frozen=True)
class Measured:
    """What the pass over the blocks found, for the report; ``run_sha256`` as the report has it."""

    evaluation: Evaluation | None
    perplexities: Mapping[str, float]
    calibration: CalibrationFacts | None = None
    passed: PassResult | None = None
    run_sha256: str | None = None
    quantized: QuantizedModel | None = None

    @property
    def zeros_were_filled(self) -> bool:
        """Whether a recovery gave up masks, which it has said itself."""
        return self.passed is not None and any(tuned.masks is not None for tuned in self.passed.finetuned)


class Delivery:
    """Exports a committed Hugging Face folder into the staging folder, validates, reports and publishes it."""

    def __init__(
        self,
        subject: Subject,
        staging: Staging,
        hf_folder: Path,
        recipe: Recipe,
        measure: Measure,
        progress: Progress,
    ) -> None:
        self._subject = subject
        self._staging = staging
        self._plan: OutputPlan = staging.plan
        self._hf = hf_folder
        self._recipe = recipe
        self._measure = measure
        self._progress = progress
        self._versions = installed_versions()
        self._counts = count_masks(read_masks(hf_folder / MASKS_NAME))
        self._told: list[str] = []

    def deliver(
        self,
        measured: Measured,
        *,
        validate: bool,
        provider: str,
        require: Sequence[str],
        notices: Sequence[str],
        parity: str = "auto",
    ) -> CompressionResult:
        """Export, validate, report, publish; the result names the published files.

        Args:
            measured: What the pass over the blocks found.
            validate: Whether the validator runs.
            provider: Its execution provider.
            require: Names of checks that must not be skipped.
            notices: What was told already and belongs into the report.
            parity: How the validator runs the ONNX model.
        """
        target = None if measured.zeros_were_filled else self._subject.target_sparsity
        taken_out = self._taken_out(measured)
        sparsity = share_of_zeros((taken_out or self._counts).values())
        lacking = shortfalls(measured.perplexities, target, sparsity, structured=bool(taken_out))
        for message in lacking:
            self._progress(Notice(message, shortfall=True))
        reach("export: before")
        with self._measure.stage("export"):
            self._progress(StageStarted("export"))
            manifest = self._export()
        reach("export: after")
        validation = None
        if validate:
            with self._measure.stage("validate"):
                self._progress(StageStarted("validate"))
                reach("validate: before")
                validation = self._validate(measured, provider, require, parity)
        told = (*notices, *lacking, *self._told, *(validation.notices if validation is not None else ()))
        report = self._report(measured, manifest, validation, told)
        write_report(report, self._plan.report_json, self._plan.report_html)
        self._progress(StageStarted("publish"))
        self._staging.publish()
        final = self._staging.final
        verdict = None if validation is None else validation.passed
        return CompressionResult(final.onnx, report.tree(), final.report_json, final.report_html, verdict)

    def _export(self) -> Manifest:
        settings = self._recipe.export
        parts = export_parts(self._hf, self._subject.dtype, trust_remote_code=self._subject.trust_remote_code)
        graph = build_graph(parts, opset=settings.opset, joined_attention=settings.joins_attention)
        with self._measure.stage("export: block check"):
            check_blocks(parts, graph)
        packed = self._packed(graph) if settings.packs else None
        tensors = write_model(
            graph.proto if packed is None else packed.proto,
            graph.weights if packed is None else packed.weights,
            self._plan.onnx,
            self._plan.data.name,
            encoding=settings.encoding if packed is None else "packed",
            metadata=self._metadata(),
            pruned=set(self._counts),
        )
        if packed is not None:
            tensors = packed.rows(tensors, self._plan.data.name)
        self._copy_model_files()
        manifest = Manifest(
            files=hash_files(self._plan.folder, self._model_files()),
            tensors=tensors,
            block_outputs=tuple(graph.block_outputs),
            pattern=self._subject.n_m,
            sparsity=self._subject.target_sparsity,
            ignored=self._recipe.pruning.ignore,
        )
        write_manifest(manifest, self._plan.manifest)
        return manifest

    def _packed(self, graph: BlockGraph) -> PackedGraph:
        """The graph with packed and integer weights; what could not be packed is told."""
        quantization = read_quantization(self._hf / SCALES_NAME)
        packed = pack_graph(
            graph.proto,
            graph.weights,
            pruned=set(self._counts),
            quantized={} if quantization is None else quantization.weights,
            activation_bits=self._recipe.export.used_activation_bits,
        )
        if packed.left:
            named = ", ".join(packed.left[:_NAMED]) + (", …" if len(packed.left) > _NAMED else "")
            message = f"{len(packed.left)} pruned weights are stored dense, as they cannot be packed: {named}"
            self._told.append(message)
            self._progress(Notice(message))
        return packed

    def _metadata(self) -> dict[str, str]:
        facts = self._subject.facts
        return {
            "blockpress.version": self._versions.get("blockpress", "unknown"),
            "blockpress.source": facts.name,
            "blockpress.revision": facts.revision or "",
            "blockpress.recipe_sha256": self._recipe.digest(),
            "blockpress.sparsity": ""
            if self._subject.target_sparsity is None
            else f"{self._subject.target_sparsity:g}",
            "blockpress.pattern": self._subject.n_m or "",
        }

    def _copy_model_files(self) -> None:
        """A folder output gets what a Hugging Face loader needs beside the ONNX file, byte for byte, and the masks.

        Only a config whose type says that layers have widths of their own gets the model's type again.
        """
        if self._plan.hf is not None:
            return
        for path in sorted(self._hf.iterdir()):
            if (
                path.is_file()
                and path.suffix != ".safetensors"
                and path.name != "model.safetensors.index.json"
            ):
                shutil.copyfile(path, self._plan.folder / path.name)
        shutil.copyfile(self._hf / MASKS_NAME, self._plan.masks)
        settings = read_json_object(self._hf / CONFIG_NAME)
        if plain_type(settings) != settings:
            write_json(self._plan.folder / CONFIG_NAME, plain_type(settings))

    def _model_files(self) -> list[str]:
        """Every file of the staging folder so far, relative, in order: all of them are model files."""
        root = self._plan.folder
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def _validate(
        self, measured: Measured, provider: str, require: Sequence[str], parity: str
    ) -> ValidationReport:
        return run_validator(
            self._plan,
            reference=self._hf,
            windows=measured.evaluation,
            known=measured.perplexities,
            gates=self._recipe.gates,
            require=require,
            provider=provider,
            parity=parity,
            trust_remote_code=self._subject.trust_remote_code,
        )

    def _report(
        self,
        measured: Measured,
        manifest: Manifest,
        validation: ValidationReport | None,
        notices: tuple[str, ...],
    ) -> Report:
        subject, passed = self._subject, measured.passed
        taken_out = self._taken_out(measured)
        counts = taken_out or self._counts
        onnx_perplexity = None if validation is None else validation.perplexity.get("onnx")
        weight_bits = self._recipe.export.weight_bits
        element_bytes = weight_bits / 8 if weight_bits else torch.empty(0, dtype=subject.dtype).element_size()
        parameters = subject.facts.parameters
        return Report(
            command=subject.command,
            output=self._plan.onnx.name,
            model=subject.facts,
            sparsity=SparsityFacts(
                target=subject.target_sparsity,
                measured=share_of_zeros(counts.values()),
                pattern=subject.n_m,
                structured=bool(taken_out),
            ),
            perplexity=perplexity_facts(
                {**measured.perplexities, "onnx": onnx_perplexity}, measured.evaluation
            ),
            calibration=measured.calibration,
            validation=validation_facts(validation),
            quantization=quantization_facts(measured.quantized),
            size=SizeFacts(
                source_bytes=subject.source_bytes,
                dense_bytes=None if parameters is None else int(parameters * element_bytes),
                onnx_bytes=onnx_bytes(self._plan),
                by_encoding=bytes_by_encoding(manifest.tensors),
            ),
            weights=weight_rows(counts, subject.blocks_name, manifest.tensors),
            blocks=() if passed is None else block_rows(passed),
            recovery=self._recipe.recovery.method if passed is not None else None,
            learning_rate=None if passed is None else learning_rate_facts(passed),
            finetuning=() if passed is None else finetuning_rows(passed),
            recipe=self._recipe.model_dump(mode="json"),
            device=str(subject.device),
            versions=self._versions,
            load=load_facts(manifest, validation),
            timings={**self._measure.timings, **stage_seconds(validation)},
            peak_memory_bytes=PeakMemory(host=peak_host_bytes(), device=peak_device_bytes()),
            manifest=manifest_facts(manifest),
            run_sha256=measured.run_sha256,
            notices=notices,
            statement=self._statement(manifest, structured=bool(taken_out)),
        )

    @staticmethod
    def _statement(manifest: Manifest, *, structured: bool) -> str:
        if structured:
            return STRUCTURED_STATEMENT
        return PACKED_STATEMENT if any(row.encoding == "packed" for row in manifest.tensors) else STATEMENT

    def _taken_out(self, measured: Measured) -> dict[str, MaskCount]:
        """What is left of each parameter, where heads or neurons were taken out; else nothing."""
        passed = measured.passed
        return {} if passed is None else count_shapes(passed, self._subject.blocks_name)


def shortfalls(
    perplexities: Mapping[str, float],
    target_sparsity: float | None,
    sparsity: float,
    *,
    structured: bool = False,
) -> list[str]:
    """What a user should know although nothing failed: a repair that made things worse, fewer zeros than asked for.

    Args:
        perplexities: By version of the model.
        target_sparsity: Share of zeros asked for; None where nothing was pruned.
        sparsity: Share of zeros that there is.
        structured: Whether it is the share of weights that were taken out instead.
    """
    found = []
    pruned, recovered = perplexities.get("pruned"), perplexities.get("recovered")
    if pruned is not None and recovered is not None and recovered > pruned:
        found.append(
            f"the repair raised the perplexity from {pruned:.2f} to {recovered:.2f}: it fits the calibration text, not "
            "the evaluation text; give more calibration windows, or text closer to the model's use"
        )
    if target_sparsity is not None and sparsity < target_sparsity - 1e-4:
        fact, why = (
            ("of the blocks' weights are gone", "whole heads and neurons")
            if structured
            else ("of the pruned weights are zero", "whole weights, row by row or block by block")
        )
        found.append(
            f"{100 * sparsity:.2f} % {fact}, not {100 * target_sparsity:g} %: the share is rounded down to {why}"
        )
    return found
