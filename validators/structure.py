"""Whether the file is the one exported, is well-formed, and holds what it should; nothing is run yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no type information

from exporters.attention_function import is_own_operator
from exporters.manifest import Manifest
from exporters.masks import read_masks
from exporters.packed_read import PackedTensor, has_integer_weights, rounds_inputs
from exporters.read import OnnxFile, read_model
from validators.checks import Check
from validators.errors import ValidationError
from validators.events import OnProgress, ValidationProgress, ignore
from validators.integrity import WatchedFiles, check_contents, check_manifest, watch
from validators.request import ValidationRequest
from validators.session import first_line
from validators.survey import Survey


@dataclass(frozen=True)
class Structure:
    """What the file is, judged without running it.

    Attributes:
        model_path: The ``.onnx`` file.
        model: Its graph, and its constants, which are read when they are asked for.
        checks: manifest, structure, finite, masks, pattern, sparsity.
        block_outputs: Name of each decoder block's output value; empty without a manifest.
        stored_dtype: The type that most bytes of floating constants have; None without any.
        watched: The files as they were when the examination began.
        packed: Whether there are packed weights.
        own_operators: Whether there are operators of blockpress-runtime, for weights or attention.
        quantized: Whether weights are integers times scales.
        rounds_inputs: Whether the graph rounds what enters products with them.
    """

    model_path: Path
    model: OnnxFile
    checks: tuple[Check, ...]
    block_outputs: tuple[str, ...]
    stored_dtype: str | None
    watched: WatchedFiles
    packed: bool
    own_operators: bool
    quantized: bool
    rounds_inputs: bool


def examine_structure(request: ValidationRequest, on_progress: OnProgress = ignore) -> Structure:
    """The file judged without running it: hashes before anything is read, containment before the checker.

    Raises:
        ValidationError: E-MANIFEST-MISMATCH; E-ONNX-INVALID: onnx.checker refuses the file.
        ExportError: The manifest, the masks or the model cannot be read (E-MANIFEST-*, E-MASKS-*, E-ONNX-*).
    """
    path = Path(request.model_path)
    watched_model = watch([path])
    on_progress(ValidationProgress("manifest"))
    manifest, manifest_check = check_manifest(request)
    model = read_model(path)
    watched = watch(_companions(model, manifest, request), watched_model)
    run_checker(path)
    masks = None if request.masks_path is None else read_masks(Path(request.masks_path))
    tensors = {tensor.name: tensor for tensor in model.tensors}
    if manifest is not None:
        check_contents(manifest, Path(request.manifest_path or ".").parent, tensors)
    survey = Survey(manifest, masks, request.pattern)
    for done, tensor in enumerate(model.tensors, start=1):
        survey.add(tensor)
        on_progress(ValidationProgress("structure", done, len(model.tensors)))
    return Structure(
        model_path=path,
        model=model,
        checks=(
            manifest_check,
            Check("structure", "passed", why=f"onnx.checker accepts it; {len(tensors)} constants"),
            survey.finite_check(),
            survey.masks_check(tensors),
            survey.pattern_check(),
            survey.sparsity_check(request.gates.min_sparsity),
        ),
        block_outputs=() if manifest is None else manifest.block_outputs,
        stored_dtype=survey.stored_dtype(),
        watched=watched,
        packed=any(isinstance(tensor, PackedTensor) for tensor in model.tensors),
        own_operators=any(is_own_operator(node) for node in model.proto.graph.node),
        quantized=has_integer_weights(model.tensors),
        rounds_inputs=rounds_inputs(model.proto.graph.node),
    )


def run_checker(path: Path) -> None:
    """Refuse a file that onnx.checker refuses. By path: only so are external data and large models looked at.

    Raises:
        ValidationError: E-ONNX-INVALID.
    """
    try:
        # Without full_check, whose shape inference rejects every model with sparse initializers.
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, DecodeError, RuntimeError, ValueError, TypeError) as error:
        raise ValidationError(
            "E-ONNX-INVALID", f"{path.name}: onnx.checker: {first_line(error)}", "export the model again"
        ) from error


def _companions(model: OnnxFile, manifest: Manifest | None, request: ValidationRequest) -> Iterator[Path]:
    """The files beside the model that its meaning depends on."""
    for tensor in model.tensors:
        yield from tensor.data_files
    if manifest is not None and request.manifest_path is not None:
        yield from (Path(request.manifest_path).parent / row.name for row in manifest.files)
