"""What survives when a run on a tiny llama is refused, stopped or fails: the older output, whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_models
from safetensors.numpy import load_file, save_file
from workshop import FILE_PRODUCTS, Workshop, contents, names_in

from compressor import ReportedError, compress
from compressor.errors import InputRefused, OutputRefused, StoppedSafely, UsageError
from compressor.report.schema import read_report
from exporters.masks import read_masks

STATE = ".sparse.onnx.state"


def with_weight(model: Path, copy: Path, name: str, value: float) -> Path:
    """A copy of a model in which the first element of one weight is `value`."""
    shutil.copytree(model, copy)
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors[name].reshape(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


@pytest.fixture
def older(workshop: Workshop, tmp_path: Path) -> Path:
    """An output of an earlier run, in a folder of its own."""
    shutil.copytree(workshop.file_output.out.parent, tmp_path / "older")
    return tmp_path / "older" / "sparse.onnx"


def test_pipeline_existing_output_is_refused_and_unchanged(workshop: Workshop, older: Path) -> None:
    """Without force an output of other settings is left alone."""
    before = contents(older.parent)
    with pytest.raises(OutputRefused) as refusal:
        compress(workshop.model, older, workshop.recipe(pruning__sparsity=0.6))
    assert refusal.value.error_id == "E-OUTPUT-EXISTS"
    assert contents(older.parent) == before


def test_pipeline_force_replaces_the_whole_output(workshop: Workshop, older: Path) -> None:
    """With force every product is the new run's and nothing of the old one is left."""
    (older.parent / "sparse.hf" / "left.over").write_text("old", encoding="utf-8")
    recipe = workshop.recipe(recovery__method="none", pruning__sparsity=0.7)
    result = compress(workshop.model, older, recipe, validate=False, force=True)
    assert names_in(older.parent) == FILE_PRODUCTS
    assert not (older.parent / "sparse.hf" / "left.over").exists()
    assert read_report(result.report_path).sparsity.target == 0.7


def test_pipeline_stop_between_blocks_leaves_the_older_output(workshop: Workshop, older: Path) -> None:
    """A run that is stopped after a block raises StoppedSafely, and leaves nothing but its state."""
    before = contents(older.parent)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(len(asked))
        return len(asked) > 1

    with pytest.raises(StoppedSafely, match="block 1 of 2") as stopped:
        compress(workshop.model, older, workshop.recipe(), force=True, stop=stop)
    assert stopped.value.exit_code == 75
    assert names_in(older.parent) == {*FILE_PRODUCTS, STATE}
    shutil.rmtree(older.parent / STATE)
    assert contents(older.parent) == before


def test_pipeline_nan_weight_is_refused_by_name(workshop: Workshop, older: Path, tmp_path: Path) -> None:
    """A weight that is not a number is named; the older output stands."""
    name = "model.layers.1.mlp.up_proj.weight"
    broken = with_weight(workshop.model, tmp_path / "nan", name, float("nan"))
    before = contents(older.parent)
    with pytest.raises(InputRefused, match=name.replace(".", r"\.")) as refusal:
        compress(broken, older, workshop.recipe(), force=True)
    assert refusal.value.error_id == "E-WEIGHTS-NONFINITE"
    assert contents(older.parent) == before
    assert names_in(older.parent) == FILE_PRODUCTS


def test_pipeline_failure_in_the_export_leaves_the_older_output(
    workshop: Workshop, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while the ONNX file is written costs nothing: the blocks that are done are kept."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compressor.delivery.write_model", full)
    before = contents(older.parent)
    with pytest.raises(OSError, match="No space left"):
        compress(workshop.model, older, workshop.recipe(recovery__method="none"), force=True)
    assert names_in(older.parent) == {*FILE_PRODUCTS, STATE}
    shutil.rmtree(older.parent / STATE)
    assert contents(older.parent) == before


def test_pipeline_pattern_that_does_not_divide_names_the_matrix(workshop: Workshop, tmp_path: Path) -> None:
    """2:4 on 54 inputs is refused before any work, with the matrix and a way out; the way out works."""
    model = tiny_models.save_variant(tmp_path / "odd", "llama", intermediate_size=54)
    out = tmp_path / "out" / "sparse.onnx"
    out.parent.mkdir()
    settings = {"pruning__pattern": "2:4", "recovery__method": "none"}
    with pytest.raises(InputRefused, match=r"model\.layers\.0\.mlp\.down_proj") as refusal:
        compress(model, out, workshop.recipe(**settings))
    assert refusal.value.error_id == "E-PATTERN-DIVIDES"
    assert names_in(out.parent) == set()
    excluding = workshop.recipe(**settings, pruning__ignore=("*.down_proj",))
    assert compress(model, out, excluding, validate=False).report["sparsity"]["measured"] == 0.5
    masked = set(read_masks(out.with_name("sparse.hf") / "masks.safetensors"))
    assert "model.layers.0.mlp.up_proj.weight" in masked
    assert "model.layers.0.mlp.down_proj.weight" not in masked


def test_pipeline_ignore_pattern_without_a_match_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    """A pattern that matches nothing is a mistake that ends the run before any work."""
    with pytest.raises(UsageError, match="nosuch") as refusal:
        workshop.quick(tmp_path / "sparse.onnx", pruning__ignore=("*.nosuch",))
    assert refusal.value.error_id == "E-IGNORE-NO-MATCH"
    assert names_in(tmp_path) == set()


def test_pipeline_required_check_must_exist(workshop: Workshop, tmp_path: Path) -> None:
    """The name of a check that there is not is refused before any work."""
    with pytest.raises(ReportedError, match="no check named parity") as refusal:
        compress(workshop.model, tmp_path / "sparse.onnx", workshop.recipe(), require=("parity",))
    assert (refusal.value.error_id, refusal.value.exit_code) == ("E-CHECK-NAME", 2)
