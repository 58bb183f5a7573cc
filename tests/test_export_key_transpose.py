"""Attention's keys are transposed by one node, wherever the exporter's three mean that, and nowhere else."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from exporters.key_transpose import simplify_key_transposes

# K (B, heads, S, D) as PyTorch's exporter transposes it; {} are what the cases change.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
attention (float[B, 2, S, 4] K, float[B, 2, 1, 4] Q) => (float[B, 2, 1, S] scores)
<int64[1] none = {{-1}}, int64[1] last = {{-1}}, int64[1] before = {{-2}}, int64[1] low = {{-9223372036854775808}},
 int64[1] high = {{9223372036854775807}}>
{{
  sizes = Shape <start = 0> (K)
  leading = Slice (sizes, low, before)
  S_size = Slice (sizes, before, last)
  D_size = Slice (sizes, last, high)
  flat = Concat <axis = 0> (none, {flat})
  back = Concat <axis = 0> (leading, {back})
  three = Reshape (K, flat)
  swapped = Transpose <perm = {perm}> (three)
  four = Reshape (swapped, back)
  scores = MatMul (Q, four)
}}
"""
USUAL = {"flat": "S_size, D_size", "back": "D_size, S_size", "perm": "[0, 2, 1]"}


def parsed(**changes: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(GRAPH.format(**USUAL | changes)))


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_three_nodes_become_one() -> None:
    """One transpose is left, without the sizes and constants that only the reshapes used, and the same numbers."""
    model = parsed()
    before = ir.serde.serialize_model(model)
    simplify_key_transposes(model.graph)
    after = ir.serde.serialize_model(model)
    assert op_types(model) == ["Transpose", "MatMul"]
    assert not model.graph.initializers
    onnx.checker.check_model(after, full_check=True)
    generator = np.random.default_rng(0)
    for batch, length in ((1, 1), (2, 3), (3, 5)):
        feeds = {
            "K": generator.standard_normal((batch, 2, length, 4)).astype(np.float32),
            "Q": generator.standard_normal((batch, 2, 1, 4)).astype(np.float32),
        }
        results = [
            onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
                None, feeds
            )[0]
            for m in (before, after)
        ]
        np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"flat": "D_size, S_size"},
        {"back": "S_size, D_size"},
        {"perm": "[0, 1, 2]"},
        {"perm": "[1, 2, 0]"},
    ],
)
def test_anything_else_stays(changes: dict[str, str]) -> None:
    """Other sizes or another permutation are another result: the graph is left as it is."""
    model = parsed(**changes)
    before = op_types(model)
    simplify_key_transposes(model.graph)
    assert op_types(model) == before


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_exporter_still_writes_what_is_simplified() -> None:
    """PyTorch's own export of an attention has the three nodes, so that a new form of them is noticed."""

    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    q, kv = torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 3, 4)
    auto = torch.export.Dim.AUTO
    axes = ({0: auto}, {0: auto, 2: auto}, {0: auto, 2: auto})
    exported = torch.export.export(Attention(), (q, kv, kv), dynamic_shapes=axes, strict=False)
    program = torch.onnx.export(exported, opset_version=18, dynamo=True, verbose=False)
    assert program is not None
    graph = program.model.graph
    simplify_key_transposes(graph)
    counts = collections.Counter(node.op_type for node in graph)
    assert counts["Transpose"] == 1
    assert counts["Reshape"] == 0
