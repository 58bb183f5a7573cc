"""What validation says of a file before it runs it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from toy_language_model import ToyExport, pruned_names, random_weights, write_export

from exporters.errors import ReportedError
from exporters.manifest import read_manifest, write_manifest
from exporters.masks import read_masks, write_masks
from validators.checks import Check, Gates
from validators.errors import ValidationError
from validators.events import ValidationProgress
from validators.integrity import check_unchanged
from validators.request import ValidationRequest
from validators.structure import examine_structure


@pytest.fixture
def export(tmp_path: Path) -> ToyExport:
    """A good export with manifest, masks and a 2:4 pattern."""
    return write_export(tmp_path / "toy")


def check_of(request: ValidationRequest, name: str) -> Check:
    """The check of this name."""
    return next(check for check in examine_structure(request).checks if check.name == name)


def refusal_of(request: ValidationRequest) -> ReportedError:
    """The error with which the file is refused."""
    with pytest.raises(ReportedError) as caught:
        examine_structure(request)
    assert caught.value.exit_code == 3
    return caught.value


def rewrite_manifest(export: ToyExport, **changes: object) -> None:
    """Replace fields of the manifest, its digest right again."""
    path = export.folder / "toy.manifest.json"
    write_manifest(dataclasses.replace(read_manifest(path), **changes), path)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["dense", "sparse"])
def test_structure_passes_a_good_file(tmp_path: Path, encoding: str) -> None:
    """Every check passes but the one without a limit, whichever way the weights are stored."""
    structure = examine_structure(write_export(tmp_path / "toy", encoding=encoding).request)
    statuses = {check.name: check.status for check in structure.checks}
    assert statuses.pop("sparsity") == "skipped"
    assert set(statuses.values()) == {"passed"}
    assert (structure.stored_dtype, len(structure.block_outputs)) == ("float32", 2)


@pytest.mark.parametrize("name", ["toy.onnx", "toy.onnx.data"])
def test_manifest_refuses_an_altered_file(export: ToyExport, name: str) -> None:
    """One flipped bit in either file is found and the file is named."""
    path = export.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    error = refusal_of(export.request)
    assert error.error_id == "E-MANIFEST-MISMATCH"
    assert name in error.message


def test_manifest_refuses_a_missing_file(export: ToyExport) -> None:
    """A data file that is gone is found before the model is read."""
    (export.folder / "toy.onnx.data").unlink()
    error = refusal_of(export.request)
    assert error.error_id == "E-MANIFEST-MISMATCH"
    assert "toy.onnx.data" in error.message


def test_manifest_of_another_model_is_refused(export: ToyExport) -> None:
    """A manifest that does not list the model proves nothing about it."""
    os.replace(export.model_path, export.folder / "other.onnx")
    request = dataclasses.replace(export.request, model_path=str(export.folder / "other.onnx"))
    assert "another model" in refusal_of(request).message


def test_manifest_must_hash_every_data_file(export: ToyExport) -> None:
    """Weights in a file without a hash could be anything."""
    files = read_manifest(export.folder / "toy.manifest.json").files
    rewrite_manifest(export, files=tuple(row for row in files if row.name == "toy.onnx"))
    error = refusal_of(export.request)
    assert error.error_id == "E-MANIFEST-MISMATCH"
    assert "toy.onnx.data" in error.message


@pytest.mark.parametrize("change", [{"nnz": 1}, {"shape": (1, 1)}, {"dtype": "float16"}, {"name": "gone"}])
def test_manifest_rows_must_be_the_file_s_tensors(export: ToyExport, change: dict[str, object]) -> None:
    """A row with another shape, type or count than the tensor, or of no tensor, is refused by name."""
    rows = read_manifest(export.folder / "toy.manifest.json").tensors
    rewrite_manifest(export, tensors=(dataclasses.replace(rows[0], **change), *rows[1:]))
    error = refusal_of(export.request)
    assert error.error_id == "E-MANIFEST-MISMATCH"
    assert str(change.get("name", rows[0].name)) in error.message


def test_manifest_is_skipped_where_there_is_none(export: ToyExport) -> None:
    """Without a manifest the check is skipped with the reason, and masks are found by name."""
    request = dataclasses.replace(export.request, manifest_path=None)
    checks = {check.name: check for check in examine_structure(request).checks}
    assert checks["manifest"].status == "skipped"
    assert checks["manifest"].why
    assert checks["masks"].status == "passed"


def test_checker_refuses_a_malformed_graph(export: ToyExport) -> None:
    """A value that is computed twice is no valid graph."""
    proto = onnx.load(export.model_path, load_external_data=False)
    proto.graph.node.append(proto.graph.node[-1])
    export.model_path.write_bytes(proto.SerializeToString())
    error = refusal_of(dataclasses.replace(export.request, manifest_path=None))
    assert error.error_id == "E-ONNX-INVALID"
    assert "toy.onnx" in error.message


def test_truncated_model_is_refused_without_manifest(export: ToyExport) -> None:
    """A file cut in half is refused as such."""
    content = export.model_path.read_bytes()
    export.model_path.write_bytes(content[: len(content) // 2])
    assert refusal_of(dataclasses.replace(export.request, manifest_path=None)).error_id.startswith("E-ONNX-")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finite_names_the_weight_that_is_not(tmp_path: Path, value: float) -> None:
    """One NaN or infinity in a weight fails the check, which names the weight."""
    weights = random_weights()
    weights["block.1.up"][weights["block.1.up"] != 0] = value
    check = check_of(write_export(tmp_path / "toy", weights=weights).request, "finite")
    assert (check.status, check.measured) == ("failed", 1)
    assert "block.1.up" in check.why


def test_finite_allows_attention_masks_of_other_tools(export: ToyExport) -> None:
    """A constant of 0 and -inf is how exporters write a causal mask; +inf or NaN is none."""
    for name, values, status in (
        ("mask", [[0, -np.inf], [0, 0]], "passed"),
        ("limit", [np.inf], "passed"),
        ("broken", [[0, np.inf], [0, 0]], "failed"),
    ):
        proto = onnx.load(export.model_path, load_external_data=False)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.float32), name))
        export.model_path.write_bytes(proto.SerializeToString())
        request = dataclasses.replace(export.request, manifest_path=None, masks_path=None)
        assert check_of(request, "finite").status == status


def test_masks_count_and_name_what_differs(export: ToyExport) -> None:
    """One bit of one mask is found, and so is its tensor."""
    path = export.folder / "masks.safetensors"
    masks = {name: mask.copy() for name, mask in read_masks(path).items()}
    masks["block.0.down"][2, 3] ^= True
    write_masks(path, masks)
    check = check_of(export.request, "masks")
    assert (check.status, check.measured) == ("failed", 1)
    assert "block.0.down" in check.why


def test_masks_must_lie_as_the_manifest_says(export: ToyExport) -> None:
    """A square mask the wrong way round differs: the row says that the weight is stored transposed."""
    path = export.folder / "masks.safetensors"
    masks = dict(read_masks(path))
    masks["block.0.q"] = masks["block.0.q"].T
    write_masks(path, masks)
    assert check_of(export.request, "masks").status == "failed"


def test_masks_must_cover_every_pruned_weight(export: ToyExport) -> None:
    """A pruned weight without a mask, or a mask without a weight, is not equal."""
    path = export.folder / "masks.safetensors"
    masks = dict(read_masks(path))
    without = {name: mask for name, mask in masks.items() if name != "block.1.k"}
    for changed, culprit in ((without, "block.1.k"), ({**masks, "extra": masks["block.1.k"]}, "extra")):
        write_masks(path, changed)
        check = check_of(export.request, "masks")
        assert check.status == "failed"
        assert culprit in check.why


def test_masks_fall_back_to_the_manifest_s_digests(export: ToyExport) -> None:
    """Without a masks file the digests of the manifest are compared."""
    request = dataclasses.replace(export.request, masks_path=None)
    assert check_of(request, "masks").status == "passed"
    rows = read_manifest(export.folder / "toy.manifest.json").tensors
    pruned = next(index for index, row in enumerate(rows) if row.pruned)
    altered = dataclasses.replace(rows[pruned], mask_sha256="0" * 64)
    rewrite_manifest(export, tensors=(*rows[:pruned], altered, *rows[pruned + 1 :]))
    check = check_of(request, "masks")
    assert check.status == "failed"
    assert rows[pruned].name in check.why


def test_masks_are_skipped_where_none_fits(export: ToyExport) -> None:
    """Without masks, or with masks of other names only, there is nothing to compare."""
    bare = dataclasses.replace(export.request, manifest_path=None, masks_path=None)
    assert check_of(bare, "masks").status == "skipped"
    write_masks(export.folder / "masks.safetensors", {"other": np.ones((2, 2), bool)})
    assert check_of(dataclasses.replace(export.request, manifest_path=None), "masks").status == "skipped"


def test_pattern_counts_groups_along_the_inputs(tmp_path: Path) -> None:
    """The toy holds 2:4 along its inputs: 1:4 fails, and so does 2:4 of a weight pruned along its outputs."""
    request = write_export(tmp_path / "good").request
    assert check_of(request, "pattern").status == "passed"
    assert check_of(dataclasses.replace(request, pattern="1:4"), "pattern").status == "failed"
    weights = random_weights()
    weights["block.0.q"] = weights["block.0.q"].T.copy()
    check = check_of(write_export(tmp_path / "turned", weights=weights).request, "pattern")
    assert check.status == "failed"
    assert "block.0.q" in check.why


def test_pattern_needs_divisible_inputs(export: ToyExport) -> None:
    """Groups of five do not fit eight inputs."""
    check = check_of(dataclasses.replace(export.request, pattern="2:5"), "pattern")
    assert check.status == "failed"
    assert "8 inputs" in check.why


def test_pattern_is_skipped_where_it_cannot_be_judged(tmp_path: Path) -> None:
    """No pattern, or no word about which weights were pruned: skipped with the reason."""
    export = write_export(tmp_path / "toy", pattern=None)
    assert check_of(export.request, "pattern").status == "skipped"
    bare = dataclasses.replace(export.request, pattern="2:4", manifest_path=None, masks_path=None)
    assert check_of(bare, "pattern").status == "skipped"


@pytest.mark.parametrize(("limit", "status"), [(0.5, "passed"), (0.51, "failed"), (None, "skipped")])
def test_sparsity_is_measured_over_the_pruned_weights(
    export: ToyExport, limit: float | None, status: str
) -> None:
    """Exactly half of the pruned weights is zero, whatever else the model holds."""
    request = dataclasses.replace(export.request, gates=Gates(min_sparsity=limit))
    check = check_of(request, "sparsity")
    assert (check.status, check.measured) == (status, 0.5)


def test_sparsity_of_an_unknown_file_counts_all_matrices(export: ToyExport) -> None:
    """Without manifest and masks every matrix counts, and the check says so."""
    weights = random_weights()
    zeros = sum(int((weights[name] == 0).sum()) for name in pruned_names())
    request = dataclasses.replace(export.request, manifest_path=None, masks_path=None)
    check = check_of(request, "sparsity")
    assert check.measured == pytest.approx(zeros / sum(values.size for values in weights.values()))
    assert "all matrices" in check.why


@pytest.mark.parametrize("name", ["toy.onnx", "toy.onnx.data"])
def test_file_swapped_while_validating_is_refused(export: ToyExport, name: str) -> None:
    """A file that is replaced after its hash was taken is noticed at the end."""

    def swap(progress: ValidationProgress) -> None:
        if progress.done == 1:
            other = export.folder / "other"
            other.write_bytes((export.folder / name).read_bytes())
            os.replace(other, export.folder / name)

    structure = examine_structure(export.request, swap)
    with pytest.raises(ValidationError, match=name) as caught:
        check_unchanged(structure.watched)
    assert caught.value.error_id == "E-VALIDATE-CHANGED"


def test_unchanged_files_pass(export: ToyExport) -> None:
    """Reading a file does not change it."""
    check_unchanged(examine_structure(export.request).watched)


def test_manifest_altered_by_hand_is_refused(export: ToyExport) -> None:
    """A manifest edited to fit an altered file no longer has its own digest."""
    path = export.folder / "toy.manifest.json"
    content = json.loads(path.read_text())
    content["sparsity"] = 0.9
    path.write_text(json.dumps(content))
    assert refusal_of(export.request).error_id == "E-MANIFEST-DIGEST"
