"""Whole runs to int8 and int4: what they leave behind, say, and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from cli_fakes import Terminal
from workshop import Workshop, contents

from compressor import CompressionResult, compress, export
from compressor.combinations import check_export
from compressor.errors import StoppedSafely, UsageError
from compressor.recipe import ExportRecipe, Recipe
from compressor.recipe_file import read_recipe
from exporters.errors import ExportError
from exporters.manifest import read_manifest
from exporters.packing import spread_scales
from exporters.quantized import SCALES_NAME, read_quantization
from exporters.read import read_model


@pytest.fixture(scope="module")
def int8(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> CompressionResult:
    """A validated run to int8 at 2:4."""
    out = tmp_path_factory.mktemp("int8") / "sparse.onnx"
    return compress(workshop.model, out, int8_recipe(workshop))


def int8_recipe(workshop: Workshop) -> Recipe:
    """A short recipe to int8 at 2:4."""
    return workshop.recipe(export__dtype="int8", pruning__pattern="2:4")


def test_quantized_run_passes_and_tells_both_errors_apart(int8: CompressionResult) -> None:
    """Sparsity and quantisation have a perplexity each; parity, masks and 2:4 hold in the packed file."""
    assert int8.passed is True
    perplexity = int8.report["perplexity"]
    assert abs(perplexity["onnx"] / perplexity["quantized"] - 1) < 3e-3
    assert 0 < abs(perplexity["quantized"] / perplexity["recovered"] - 1) < 0.05
    checks = {check["name"]: check["status"] for check in int8.report["validation"]["checks"]}
    assert {name for name, status in checks.items() if status == "passed"} >= {
        "masks", "pattern", "parity-prefill", "parity-decode", "parity-padded", "perplexity-drift",
    }  # fmt: skip
    assert "packed-fallback" in checks
    facts = int8.report["quantization"]
    assert (facts["bits"], facts["group_size"], facts["activation_bits"], len(facts["blocks"])) == (
        8,
        0,
        8,
        2,
    )
    assert all(0 < block["error"] <= block["nearest_error"] for block in facts["blocks"])
    assert int8.report["model"]["export_dtype"] == "int8"
    assert "quantised" in int8.html_path.read_text(encoding="utf-8")


def test_quantized_run_packs_every_pruned_matrix_and_leaves_no_float_matrix(int8: CompressionResult) -> None:
    """Pruned matrices are packed int8, the tied embedding is one int8 matrix, and nothing large is float."""
    rows = read_manifest(int8.out.with_suffix(".manifest.json")).tensors
    matrices = [row for row in rows if len(row.shape) == 2]
    assert {(row.encoding, row.dtype) for row in matrices if row.pruned} == {("packed", "int8")}
    assert [(row.name, row.encoding, row.dtype) for row in matrices if not row.pruned] == [
        ("model.embed_tokens.weight", "dense", "int8")
    ]


def test_quantized_folder_holds_multiples_of_its_scales(int8: CompressionResult) -> None:
    """The PyTorch model is what the file computes: integers times scales, which lie beside the weights."""
    quantization = read_quantization(int8.out.with_suffix(".hf") / SCALES_NAME)
    assert quantization is not None
    assert quantization.activation_bits == 8
    tensors = {tensor.name: tensor for tensor in read_model(int8.out).tensors}
    name = "model.layers.0.self_attn.q_proj.weight"
    steps = tensors[name].load() / quantization.weights[name].scales
    assert np.abs(steps - np.rint(steps)).max() < 1e-3
    assert np.abs(steps).max() == pytest.approx(127, abs=1e-3)


def test_bench_counts_mapped_pages_of_a_relative_path(
    int8: CompressionResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed weights are used where they are mapped; workers find their pages though they run in another folder."""
    pytest.importorskip("blockpress_runtime", reason="needs the operator library")
    monkeypatch.chdir(int8.out.parent)
    quick = ("--rounds", "1", "--loads", "1", "--prompt-tokens", "2", "--decode-tokens", "2")
    ended = Terminal(capsys).run("bench", int8.out.name, "--make", "none", *quick, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["models"][0]["mapped_bytes"] > 0


@pytest.mark.parametrize(("variant", "dtype"), [("mixtral", "int8"), ("qwen3_moe", "int4")])
def test_quantized_run_packs_fused_experts(
    workshop: Workshop, tmp_path: Path, variant: str, dtype: str
) -> None:
    """Experts are integers times scales like all other matrices, their inputs rounded in PyTorch as in the file."""
    model = tiny_models.save_variant(tmp_path / variant, variant)
    recipe = workshop.recipe(export__dtype=dtype)
    result = compress(model, tmp_path / "sparse.onnx", recipe)
    assert result.passed is True
    perplexity = result.report["perplexity"]
    assert abs(perplexity["onnx"] / perplexity["quantized"] - 1) < 3e-3
    rows = read_manifest(tmp_path / "sparse.manifest.json").tensors
    experts = [row for row in rows if len(row.shape) == 3]
    assert len(experts) == 4
    assert {(row.encoding, row.dtype, row.pruned) for row in experts} == {("packed", dtype, True)}
    assert not [
        row.name for row in rows if row.dtype == "float32" and len(row.shape) > 1 and "gate" not in row.name
    ]
    quantization = read_quantization(tmp_path / "sparse.hf" / SCALES_NAME)
    assert quantization is not None
    tensors = {tensor.name: tensor for tensor in read_model(tmp_path / "sparse.onnx").tensors}
    weight, found = quantization.weights[experts[0].name], tensors[experts[0].name].load()
    expected_scales = spread_scales(weight.scales, found.shape[2], weight.group_size)
    steps = found.reshape(-1, found.shape[2]) / expected_scales
    assert np.abs(steps - np.rint(steps)).max() < 1e-3
    assert all(
        0 < block["error"] <= block["nearest_error"] for block in result.report["quantization"]["blocks"]
    )


def test_experts_that_cannot_be_packed_stay_floats(workshop: Workshop, tmp_path: Path) -> None:
    """Their inputs are then not rounded either, in PyTorch as in the file; the rest is quantised."""
    model = tiny_models.save_variant(tmp_path / "mixtral", "mixtral", intermediate_size=36)
    recipe = workshop.recipe(export__dtype="int8", recovery__method="none", finish__method="none")
    result = compress(model, tmp_path / "sparse.onnx", recipe)
    assert result.passed is True
    rows = read_manifest(tmp_path / "sparse.manifest.json").tensors
    kinds = {(len(row.shape), row.encoding, row.dtype) for row in rows if row.pruned}
    assert kinds == {(2, "packed", "int8"), (3, "dense", "float32")}


def test_quantized_run_goes_on_to_the_same_bytes(
    workshop: Workshop, int8: CompressionResult, tmp_path: Path
) -> None:
    """Stopped behind the first block and run again, it ends with the files of a run that was not stopped."""
    out, asked = tmp_path / "sparse.onnx", []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 1

    with pytest.raises(StoppedSafely):
        compress(workshop.model, out, int8_recipe(workshop), stop=stop, validate=False)
    compress(workshop.model, out, int8_recipe(workshop), validate=False, resume="required")
    whole, again = contents(int8.out.parent), contents(out.parent)
    reports = {"sparse.report.json", "sparse.report.html"}
    assert {name: again[name] for name in again if name not in reports} == {
        name: whole[name] for name in whole if name not in reports
    }


def test_export_quantizes_to_int4_without_calibration(int8: CompressionResult, tmp_path: Path) -> None:
    """A model pruned elsewhere goes out as packed int4, its inputs left as they are."""
    settings = ExportRecipe(dtype="int4", activation_bits=32)
    recipe = read_recipe(None, {"evaluation.max_windows": 2, "calibration.seqlen": 24})
    recipe = recipe.model_copy(update={"export": settings})
    result = export(int8.out.with_suffix(".hf"), tmp_path / "m.onnx", recipe, validate=False)
    assert result.report["size"]["by_encoding"]["packed"]["tensors"] == 14
    assert result.report["quantization"]["blocks"][0]["error"] is None


def test_packed_exports_have_an_operator_for_attention_unless_told(
    int8: CompressionResult, tmp_path: Path
) -> None:
    """One for each block, and its meaning beside it; with ``export.attention: standard`` neither."""
    recipe = read_recipe(None, {"evaluation.max_windows": 2, "calibration.seqlen": 24})
    settings = ExportRecipe(dtype="int8", attention="standard")
    recipe = recipe.model_copy(update={"export": settings})
    standard = export(int8.out.with_suffix(".hf"), tmp_path / "m.onnx", recipe)
    assert standard.passed is True
    for result, count in ((int8, 2), (standard, 0)):
        proto = read_model(result.out).proto
        assert [node.op_type for node in proto.graph.node].count("RotaryAttention") == count
        assert ("RotaryAttention" in {function.name for function in proto.functions}) is (count > 0)


def _parts(path: Path, ending: str) -> tuple[int, int]:
    """Where the first part of this name lies in the data file: offset and length."""
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.name.endswith(ending):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            return int(entries["offset"]), int(entries["length"])
    raise AssertionError(ending)


def _flip(path: Path, ending: str, place: int = 0) -> None:
    """Change a byte of a part."""
    data = path.with_name(f"{path.name}.data")
    content = bytearray(data.read_bytes())
    offset, length = _parts(path, ending)
    content[offset + place % length] ^= 0x01  # not all bits: 2:4 keeps as many as it leaves
    data.write_bytes(content)


def _attribute(name: str, value: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        node = next(node for node in model.graph.node if node.domain == "blockpress")
        next(a for a in node.attribute if a.name == name).i = value
        path.write_bytes(model.SerializeToString())

    return change


def _rename(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.domain == "blockpress")
    node.input[2] = "nowhere"
    path.write_bytes(model.SerializeToString())


def _read_all(path: Path) -> None:
    for tensor in read_model(path).tensors:
        tensor.load()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "mask": lambda path: _flip(path, ".mask"),
    "offsets": lambda path: _flip(path, ".offsets", 8),
    "end of values": lambda path: _flip(path, ".values", -1),
    "format version": _attribute("format_version", 2),
    "columns": _attribute("columns", 4096),
    "group size": _attribute("group_size", 65),
    "part missing": _rename,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_packed_weights_are_refused_without_a_manifest(
    int8: CompressionResult, tmp_path: Path, damage: str
) -> None:
    """Whatever leads out of a packed weight's tensors is named, also where no hash could find it."""
    path = tmp_path / "sparse.onnx"
    for name in (path.name, f"{path.name}.data"):
        (tmp_path / name).write_bytes((int8.out.parent / name).read_bytes())
    DAMAGES[damage](path)
    with pytest.raises(ExportError) as refused:
        _read_all(path)
    assert refused.value.error_id == "E-ONNX-PACKED"


@pytest.mark.parametrize(
    ("settings", "error_id"),
    [
        ({"dtype": "int8", "encoding": "dense"}, "E-EXPORT-ENCODING"),
        ({"dtype": "int4", "encoding": "sparse"}, "E-EXPORT-ENCODING"),
        ({"dtype": "float32", "encoding": "packed", "activation_bits": 8}, "E-EXPORT-ACTIVATIONS"),
    ],
)
def test_export_settings_that_contradict_each_other_are_refused(settings: dict, error_id: str) -> None:
    """int8 and int4 are packed, and 8-bit activations need them; the other combinations stand."""
    with pytest.raises(UsageError) as refused:
        check_export(ExportRecipe(**settings))
    assert refused.value.error_id == error_id
    check_export(ExportRecipe(dtype="int8", encoding="packed", activation_bits=32))
    check_export(ExportRecipe(dtype="float16", encoding="packed"))
