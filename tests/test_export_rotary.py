"""Rotary embeddings take their signs from the table of sines, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from architectures import build
from exported_models import exported
from small_graphs import op_types
from torch import Tensor, nn
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from exporters.causal_lm import LoadedParts, build_graph
from exporters.rotary import simplify_rotary_embeddings

# rotate_half(x) * sin as PyTorch's exporter writes it, without the sum that follows; {} are what the cases change.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
rotary (float[B, 2, S, {width}] x, float[B, 1, S, {width}] angles) => (float[B, 2, S, {width}] y{outputs})
<int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] four = {{4}},
 int64[1] last = {{-1}}, int64[1] middle = {{-3}}, int64[1] end = {{9223372036854775807}}>
{{
  sine = Sin (angles)
  x1 = Slice ({first})
  x2 = Slice ({second})
  {negated}
  joined = {joined}
  {product}
}}
"""
USUAL = {
    "width": "6",
    "outputs": "",
    "first": "x, zero, three, three, one",
    "second": "x, three, end, three, one",
    "negated": "minus = Neg (x2)",
    "joined": "Concat <axis = -1> (minus, x1)",
    "product": "y = Mul (joined, sine)",
}


def parsed(**changes: str) -> ir.Model:
    model = onnx.parser.parse_model(GRAPH.format(**USUAL | changes))
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def results(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first": "x, zero, middle, last", "second": "x, middle, end, last"},
        {"joined": "Concat <axis = 3> (minus, x1)"},
        {"product": "y = Mul (sine, joined)"},
    ],
)
def test_signs_move_into_the_table(changes: dict[str, str]) -> None:
    """Slices and negation become a split, however halves and axis are named, and no bit of the result is another."""
    model = parsed(**changes)
    before = ir.serde.serialize_model(model)
    simplify_rotary_embeddings(model.graph)
    after = ir.serde.serialize_model(model)
    assert op_types(model.graph) == ["Sin", "Mul", "Split", "Concat", "Mul"]
    onnx.checker.check_model(after, full_check=True)
    generator = np.random.default_rng(0)
    for batch, length in ((1, 1), (2, 5)):
        x = generator.standard_normal((batch, 2, length, 6)).astype(np.float32)
        x[:, 0, 0, ::2] = 0
        angles = generator.uniform(-20, 20, (batch, 1, length, 6)).astype(np.float32)
        found = [results(m, {"x": x, "angles": angles}) for m in (before, after)]
        assert found[0].tobytes() == found[1].tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"first": "x, zero, two, three, one", "second": "x, two, end, three, one"},
        {"first": "x, zero, four, three, one", "second": "x, four, end, three, one"},
        {"first": "x, zero, end, three, two", "second": "x, one, end, three, two"},
        {"first": "x, zero, three, three, two", "second": "x, three, end, three, two"},
        {"first": "x, three, end, three, one", "second": "x, zero, three, three, one"},
        {"first": "x, zero, three, two, one", "second": "x, three, end, two, one"},
        {"negated": "minus = Neg (x1)", "joined": "Concat <axis = -1> (x2, minus)"},
        {"negated": "minus = Neg (x1)", "joined": "Concat <axis = -1> (minus, x2)"},
        {"joined": "Concat <axis = -1> (x1, minus)"},
        {"joined": "Concat <axis = -1> (minus, x1, x1)"},
        {"joined": "Concat <axis = -1> (minus, minus)"},
        {"joined": "Concat <axis = 2> (minus, x1)"},
        {"joined": "Add (minus, x1)"},
        {"width": "5", "first": "x, zero, two, three, one", "second": "x, two, end, three, one"},
        {"second": "angles, three, end, three, one"},
        {"negated": "minus = Abs (x2)"},
        {"outputs": ", float[B, 2, S, 3] minus"},
        {"outputs": ", float[B, 2, S, 3] x2"},
        {"negated": "minus = Neg (x2) z = Abs (x1)", "outputs": ", float[B, 2, S, 3] z"},
        {"outputs": ", float[B, 2, S, 6] joined"},
        {"product": "y = Add (joined, sine)"},
        {"product": "y = Mul (joined, joined)"},
        {"product": "y = Mul (joined, angles)"},
        {"product": "scale = Slice (sine, zero, one, three, one) y = Mul (joined, scale)"},
    ],
)
def test_anything_else_stays(changes: dict[str, str]) -> None:
    """Other columns, signs, axes or uses are another result, or save nothing: the graph is left as it is."""
    model = parsed(**changes)
    before = ir.serde.serialize_model(model)
    simplify_rotary_embeddings(model.graph)
    assert ir.serde.serialize_model(model) == before


class Rotary(nn.Module):
    """Queries and keys, each rotated by a table."""

    def __init__(self, apply: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._apply_rotary = apply

    def forward(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_rotary(q, k, angles.cos(), angles.sin())


def traced(apply: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32) -> ir.Graph:
    q, k = torch.zeros(2, 4, 3, 8, dtype=dtype), torch.zeros(2, 2, 3, 8, dtype=dtype)
    angles, auto = torch.zeros(2, 3, 8, dtype=dtype), torch.export.Dim.AUTO
    axes = ({0: auto, 2: auto}, {0: auto, 2: auto}, {0: auto, 1: auto})
    exporting = torch.export.export(Rotary(apply), (q, k, angles), dynamic_shapes=axes, strict=False)
    program = torch.onnx.export(exporting, opset_version=18, dynamo=True, verbose=False)
    assert program is not None
    return program.model.graph


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exporter_still_writes_what_is_simplified(dtype: torch.dtype) -> None:
    """PyTorch's own export of a rotary embedding has the five nodes; queries and keys share one table with signs."""
    graph = traced(modeling_llama.apply_rotary_pos_emb, dtype)
    assert {"Slice", "Neg"} <= set(op_types(graph))
    simplify_rotary_embeddings(graph)
    assert not {"Slice", "Neg"} & set(op_types(graph))
    assert op_types(graph).count("Split") == 2
    assert op_types(graph).count("Mul") == 5
    (signs,) = (value for value in graph.initializers.values() if len(value.uses()) and value.shape == [8])
    assert signs.const_value is not None
    expected = np.array([-1] * 4 + [1] * 4, str(dtype).removeprefix("torch."))
    np.testing.assert_array_equal(signs.const_value.numpy(), expected, strict=True)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_interleaved_columns_stay() -> None:
    """Where pairs of neighbouring columns are rotated there are no halves to change places."""
    graph = traced(modeling_cohere.apply_rotary_pos_emb)
    before = op_types(graph)
    simplify_rotary_embeddings(graph)
    assert op_types(graph) == before


@pytest.mark.parametrize(("variant", "tables"), [("llama", 1), ("gpt_neox", 1), ("gemma3_text", 2)])
def test_tables_are_signed_once_for_all_blocks(variant: str, tables: int) -> None:
    """The prologue has one table with signs for each of the model's, whether a head is rotated wholly or partly."""
    nodes = exported(variant).graph.proto.graph.node
    assert not any(node.op_type == "Neg" for node in nodes)
    signed = [node for node in nodes if any("rotary_signs" in name for name in node.input)]
    assert [node.op_type for node in signed] == ["Mul"] * tables
    assert all(node.name.startswith("prologue/") for node in signed)
    users = [node.name for node in nodes if set(node.input) & {one.output[0] for one in signed}]
    assert len(users) == 4  # queries and keys of two blocks


def test_blocks_of_a_float16_model_share_a_float16_table() -> None:
    """The signs have the type of the table that they change."""
    initializers = build_graph(LoadedParts(build("llama").half())).proto.graph.initializer
    (signs,) = (tensor for tensor in initializers if "rotary_signs" in tensor.name)
    assert signs.data_type == onnx.TensorProto.FLOAT16
