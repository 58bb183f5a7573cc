"""RMS norms divide by a root where the exporter multiplies by its reciprocal, and ONNX Runtime then fuses them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from architectures import build
from exported_models import exported
from small_graphs import op_types, results
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from exporters.causal_lm import BlockGraph, LoadedParts, build_graph
from exporters.rms_norm import simplify_rms_norms
from exporters.wire import write_model

# x / sqrt(v) as PyTorch's exporter writes it; {} is what the cases change.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
norm (float[B, 6] x, float[B, 1] v) => (float[B, 6] y{outputs})
{{
  root = Sqrt (v)
  {nodes}
}}
"""


def parsed(nodes: str, outputs: str = "") -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(GRAPH.format(nodes=nodes, outputs=outputs)))


def optimised(path: Path) -> Counter[str]:
    """How often ONNX Runtime has each operator once it has optimised the model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that such a file fits this machine only
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    proto = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Counter(node.op_type for node in proto.graph.node)


@pytest.mark.parametrize("factors", ["x, rsqrt", "rsqrt, x"])
def test_product_with_a_reciprocal_becomes_a_division(factors: str) -> None:
    """The reciprocal goes, whichever factor it is; the numbers differ by its rounding."""
    model = parsed(f"rsqrt = Reciprocal (root) y = Mul ({factors})")
    before = ir.serde.serialize_model(model)
    simplify_rms_norms(model.graph)
    after = ir.serde.serialize_model(model)
    assert op_types(model.graph) == ["Sqrt", "Div"]
    onnx.checker.check_model(after, full_check=True)
    generator = np.random.default_rng(0)
    feeds = {
        "x": generator.standard_normal((50, 6)).astype(np.float32),
        "v": generator.uniform(1e-6, 10, (50, 1)).astype(np.float32),
    }
    results = [
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )
        for m in (before, after)
    ]
    # Three roundings of 2**-24: reciprocal and product on one side, the division on the other.
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=3 * 2**-24, atol=0)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ("rsqrt = Reciprocal (root) y = Mul (x, rsqrt) z = Neg (rsqrt)", ", float[B, 1] z"),
        ("rsqrt = Reciprocal (root) y = Mul (x, rsqrt)", ", float[B, 1] rsqrt"),
        ("rsqrt = Reciprocal (root) square = Mul (rsqrt, rsqrt) y = Add (x, square)", ""),
        ("rsqrt = Reciprocal (root) y = Add (x, rsqrt)", ""),
        ("size = Abs (v) rsqrt = Reciprocal (size) y = Mul (x, rsqrt)", ", float[B, 1] root"),
        (
            "rsqrt = Reciprocal (root) half = Cast <to = 10> (rsqrt) h = Cast <to = 10> (x) "
            "scaled = Mul (h, half) y = Cast <to = 1> (scaled)",
            "",
        ),
    ],
)
def test_anything_else_stays(nodes: str, outputs: str) -> None:
    """A reciprocal with another use, of something else, or rounded before its use: the graph is left as it is."""
    model = parsed(nodes, outputs)
    before = ir.serde.serialize_model(model)
    simplify_rms_norms(model.graph)
    assert ir.serde.serialize_model(model) == before


# The norm of transposed heads, as Gemma 3 has it; {} are what the cases change.
NORM_OF_HEADS = """
<ir_version: 10, opset_import: ["" : 18]>
heads (float[B, T, 4, 6] x, float[6] w, float[B, 4, T, 6] wide) => ({outputs})
<float two = {{2.0}}, float small = {{0.000001}}, int64[1] last = {{-1}}, int64[1] other = {{-2}}>
{{
  heads = Transpose <perm = {perm}> (x)
  square = Pow (heads, two)
  mean = ReduceMean <keepdims = 1> (square, {axis})
  sum = Add (mean, small)
  root = Sqrt (sum)
  {end}
}}
"""
USUAL = {
    "perm": "[0, 2, 1, 3]",
    "axis": "last",
    "end": "quotient = Div (heads, root) norm = Mul (w, quotient) y = Abs (norm)",
    "outputs": "float[B, 4, T, 6] y",
}


def parsed_heads(**changes: str) -> ir.Model:
    model = onnx.parser.parse_model(NORM_OF_HEADS.format(**USUAL | changes))
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize(
    "end", [USUAL["end"], "quotient = Div (heads, root) norm = Mul (quotient, w) y = Abs (norm)"]
)
def test_heads_are_transposed_behind_their_norm(end: str) -> None:
    """The norm takes what was transposed; only the order in which a mean is summed may differ."""
    model, after = parsed_heads(end=end), parsed_heads(end=end)
    simplify_rms_norms(after.graph)
    assert op_types(after.graph) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Transpose", "Abs"]
    generator = np.random.default_rng(0)
    feeds = {
        "x": generator.standard_normal((2, 3, 4, 6)).astype(np.float32),
        "w": generator.standard_normal(6).astype(np.float32),
        "wide": np.zeros((2, 4, 3, 6), np.float32),
    }
    found = [results(one, feeds, optimise=False)[0] for one in (model, after)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "perm": "[0, 3, 1, 2]",
            "outputs": "float[B, 6, T, 4] quotient",
            "end": "quotient = Div (heads, root)",
        },
        {"axis": "other"},
        {"end": "quotient = Div (heads, root) y = Mul (w, quotient)"},
        {"end": "quotient = Div (heads, root) norm = Mul (wide, quotient) y = Abs (norm)"},
        {"end": "quotient = Div (heads, root) norm = Add (w, quotient) y = Abs (norm)"},
        {
            "end": "quotient = Div (wide, root) norm = Mul (w, quotient) more = Div (heads, wide) y = Add (norm, more)"
        },
        {"end": "quotient = Div (root, heads) norm = Mul (w, quotient) y = Abs (norm)"},
        {"end": "quotient = Div (heads, root) norm = Mul (w, quotient) y = Add (norm, heads)"},
        {
            "end": "quotient = Div (heads, root) norm = Mul (w, quotient) y = Abs (norm)",
            "outputs": "float[B, 4, T, 6] y, float[B, 4, T, 6] heads",
        },
    ],
)
def test_transposition_of_anything_else_stays(changes: dict[str, str]) -> None:
    """Another axis, weight or use would be another result: the graph is left as it is."""
    model = parsed_heads(**changes)
    before = ir.serde.serialize_model(model)
    simplify_rms_norms(model.graph)
    assert ir.serde.serialize_model(model) == before


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exporter_still_writes_what_is_simplified(dtype: torch.dtype, tmp_path: Path) -> None:
    """PyTorch's own export of a norm has the three nodes, and ONNX Runtime fuses the two; a new form is noticed."""
    norm, x = LlamaRMSNorm(8).to(dtype).requires_grad_(False), torch.zeros(2, 3, 8, dtype=dtype)
    auto = torch.export.Dim.AUTO
    exporting = torch.export.export(norm, (x,), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    program = torch.onnx.export(exporting, opset_version=18, dynamo=True, verbose=False)
    assert program is not None
    assert "Reciprocal" in op_types(program.model.graph)
    simplify_rms_norms(program.model.graph)
    assert "Reciprocal" not in op_types(program.model.graph)
    onnx.save(ir.serde.serialize_model(program.model), tmp_path / "norm.onnx")
    operators = optimised(tmp_path / "norm.onnx")
    assert operators["SimplifiedLayerNormalization"] == 1
    assert not operators.keys() & {"Pow", "ReduceMean", "Sqrt", "Div"}


def assert_norms_are_fused(model: transformers.PreTrainedModel, graph: BlockGraph, folder: Path) -> None:
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    write_model(graph.proto, graph.weights, folder / "model.onnx", "model.onnx.data", encoding="dense")
    assert optimised(folder / "model.onnx")["SimplifiedLayerNormalization"] == norms > 0


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma3_text"])
def test_all_norms_of_a_model_are_fused(variant: str, tmp_path: Path) -> None:
    """ONNX Runtime has one kernel for each norm, also of queries and keys, and where one is added to the weight."""
    assert_norms_are_fused(exported(variant).model, exported(variant).graph, tmp_path)


def test_all_norms_of_a_float16_model_are_fused(tmp_path: Path) -> None:
    """The casts to float32 and back that a norm has in a float16 model do not keep ONNX Runtime from it."""
    model = build("llama").half()
    assert_norms_are_fused(model, build_graph(LoadedParts(model)), tmp_path)
