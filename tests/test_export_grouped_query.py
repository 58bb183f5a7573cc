"""Products take shared heads as they are, once for all their queries, and nothing else is taken for shared heads."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from architectures import build
from exported_models import exported
from small_graphs import op_types, results

from exporters.causal_lm import LoadedParts, build_graph
from exporters.grouped_query import simplify_grouped_attention

# Attention scores of 6 query heads of which each 3 share a key head; {} are what the cases change.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
attention (float[{keys}] K, float[B, {queries}, T, 4] Q) => (float[B, 6, T, L] y{outputs})
<int64[1] axis = {{{axis}}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] four = {{4}}, int64[1] six = {{6}},
 float half = {{0.5}}, float[1] halves = {{0.5}},
 float[B, 2, 1, L, 4] apart, float[{wide}] wide, float[{repeated}] repeated, float[B, {queries}, T, 4] q>
{{
  B_size = Shape <start = 0, end = 1> (K)
  L_size = Shape <start = 2, end = 3> (K)
  wide_sizes = Concat <axis = 0> ({sizes})
  sizes = Concat <axis = 0> (B_size, six, L_size, four)
  apart = Unsqueeze (K, axis)
  wide = Expand (apart, wide_sizes)
  repeated = Reshape (wide, sizes)
  {product}
}}
"""
SWAPPED = "swapped = Transpose <perm = [0, 1, 3, 2]> (repeated)"
USUAL = {
    "keys": "B, 2, L, 4",
    "queries": "6",
    "axis": "2",
    "sizes": "B_size, two, three, L_size, four",
    "wide": "B, 2, 3, L, 4",
    "repeated": "B, 6, L, 4",
    "product": f"{SWAPPED} scores = MatMul (Q, swapped) y = Abs (scores)",
    "outputs": "",
}


def parsed(**changes: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(GRAPH.format(**USUAL | changes)))


@pytest.mark.parametrize(
    ("product", "outputs", "nodes"),
    [
        (USUAL["product"], "", "Transpose Reshape MatMul Reshape Abs"),
        (
            f"{SWAPPED} k = Mul (half, swapped) q = Mul (Q, half) scores = MatMul (q, k) y = Abs (scores)",
            "",
            "Transpose Mul Reshape Mul MatMul Reshape Abs",
        ),
        (
            f"{SWAPPED} q = Mul (Q, half) scores = MatMul (q, swapped) y = Abs (scores) other = Abs (q)",
            ", float[B, 6, T, 4] other",
            "Transpose Mul Reshape MatMul Reshape Abs Abs",
        ),
        (
            f"{SWAPPED} scores = MatMul (Q, swapped) y = Abs (scores) z = MatMul (y, repeated) other = Abs (z)",
            ", float[B, 6, T, 4] other",
            "Transpose Reshape MatMul Reshape Abs Reshape MatMul Reshape Abs",
        ),
        (
            f"{SWAPPED} scores = MatMul (Q, swapped) y = Abs (scores) other = Abs (repeated)",
            ", float[B, 6, L, 4] other",
            "Shape Shape Concat Concat Unsqueeze Expand Reshape Transpose Reshape MatMul Reshape Abs Abs",
        ),
    ],
)
def test_heads_are_multiplied_as_they_are(product: str, outputs: str, nodes: str) -> None:
    """Nothing is expanded for the product, a factor stays beside it, and the numbers are the same."""
    model, after = (parsed(product=product, outputs=outputs) for _ in range(2))
    simplify_grouped_attention(after.graph)
    assert op_types(after.graph) == nodes.split()
    generator = np.random.default_rng(0)
    for batch, length, keys in ((1, 1, 1), (1, 1, 7), (3, 5, 9)):
        feeds = {
            "K": generator.standard_normal((batch, 2, keys, 4)).astype(np.float32),
            "Q": generator.standard_normal((batch, 6, length, 4)).astype(np.float32),
        }
        for found, expected in zip(results(after, feeds), results(model, feeds), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"product": f"{SWAPPED} y = MatMul (Q, swapped)"},
        {"queries": "1"},
        {"axis": "1", "sizes": "B_size, three, two, L_size, four", "wide": "B, 3, 2, L, 4"},
        {"keys": "B, 2, 1, 4"},
        {"keys": "B, H, L, 4"},
        {"wide": "B, 2, 3, M, 4", "repeated": "B, 6, M, 4"},
        {"repeated": "B, 6, M, 4"},
        {"wide": "B, 2, G, L, 4"},
        {"product": "turned = Transpose <perm = [0, 3, 1, 2]> (repeated) s = MatMul (Q, turned) y = Abs (s)"},
        {"product": f"{SWAPPED} k = Mul (swapped, halves) s = MatMul (Q, k) y = Abs (s)"},
        {"product": f"{SWAPPED} k = Mul (swapped, swapped) s = MatMul (Q, k) y = Abs (s)"},
        {"product": f"{SWAPPED} k = Add (swapped, half) s = MatMul (Q, k) y = Abs (s)"},
        {"product": f"{SWAPPED} s = MatMul (Q, swapped) t = MatMul (Q, swapped) y = Add (s, t)"},
        {"product": f"{SWAPPED} s = MatMul (swapped, Q) y = Abs (s)"},
        {
            "product": f"{SWAPPED} s = MatMul (Q, swapped) y = Abs (s)",
            "outputs": ", float[B, 6, 4, L] swapped",
        },
    ],
)
def test_anything_else_stays(changes: dict[str, str]) -> None:
    """Another order of heads, factor or use, or sizes that are not certain: the graph is left as it is."""
    model = parsed(**changes)
    before = ir.serde.serialize_model(model)
    simplify_grouped_attention(model.graph)
    assert ir.serde.serialize_model(model) == before


@pytest.mark.parametrize("variant", ["llama", "gemma", "gemma2"])
def test_exports_expand_no_cache(variant: str) -> None:
    """No block expands keys or values, whether its attention is PyTorch's or written out."""
    nodes = exported(variant).graph.proto.graph.node
    assert not [node.name for node in nodes if node.op_type == "Expand" and "layers." in node.name]
    users = [node for node in nodes if any("/heads_" in name for name in node.input)]
    assert [node.op_type for node in users] == ["Reshape"] * 8  # around two products of two blocks


def test_heads_that_are_not_shared_stay() -> None:
    """As many key heads as heads: nothing is expanded, nothing reshaped."""
    graph = build_graph(LoadedParts(build("llama", num_key_value_heads=4))).proto.graph
    assert not any("/heads_" in name for node in graph.node for name in node.input)
