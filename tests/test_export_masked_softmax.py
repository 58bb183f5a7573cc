"""A softmax whose scores have a finite mask is not looked through for NaN, and every other one is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from architectures import build
from exported_models import exported
from small_graphs import op_types, results

from exporters.causal_lm import LoadedParts, build_graph
from exporters.masked_softmax import simplify_masked_softmax

# The scores of an attention as PyTorch's exporter masks them; {} are what the cases change.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
attention ({dtype}[B, T, L] scores, bool[B, T, L] seen) => ({dtype}[B, T, L] y{outputs})
<{dtype} zero = {{0}}, {dtype} low = {{{low}}}>
{{
  {mask}
  masked = {masked}
  weights = Softmax <axis = -1> (masked)
  {nan}
  y = Abs (kept)
}}
"""
USUAL = {
    "dtype": "float",
    "low": "-3.4028234663852886e38",
    "mask": "mask = Where (seen, zero, low)",
    "masked": "Add (scores, mask)",
    "nan": "missing = IsNaN (weights) kept = Where (missing, zero, weights)",
    "outputs": "",
}
WITHOUT_NAN = ["Where", "Add", "Softmax", "Abs"]


def parsed(infinite: bool = False, **changes: str) -> ir.Model:
    proto = onnx.parser.parse_model(GRAPH.format(**USUAL | changes))
    if infinite:  # which the parser cannot read
        proto.graph.initializer[1].CopyFrom(
            onnx.numpy_helper.from_array(np.array(-np.inf, np.float32), "low")
        )
    return ir.serde.deserialize_model(proto)


@pytest.mark.parametrize("masked", ["Add (scores, mask)", "Add (mask, scores)"])
def test_softmax_of_finite_masks_is_taken_as_it_is(masked: str) -> None:
    """The numbers are the same bit for bit, also of a query that may see no key."""
    model, after = parsed(masked=masked), parsed(masked=masked)
    simplify_masked_softmax(after.graph)
    assert op_types(after.graph) == WITHOUT_NAN
    generator = np.random.default_rng(0)
    seen = generator.random((2, 3, 5)) < 0.5
    seen[0, 0] = False
    feeds = {"scores": generator.standard_normal((2, 3, 5)).astype(np.float32) * 50, "seen": seen}
    found = [results(one, feeds)[0] for one in (model, after)]
    assert np.isfinite(found[0]).all()
    assert found[0].tobytes() == found[1].tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"infinite": True},
        {"dtype": "float16", "low": "64511"},  # the bits of -65504
        {"mask": "negated = Not (seen) numbers = Cast <to = 1> (negated) mask = Mul (numbers, low)"},
        {"mask": "mask = Where (seen, scores, low)"},
        {"masked": "Mul (scores, mask)"},
        {"nan": "missing = IsInf (weights) kept = Where (missing, zero, weights)"},
        {"nan": "missing = IsNaN (weights) kept = Where (missing, weights, zero)"},
        {
            "nan": "missing = IsNaN (weights) kept = Where (seen, zero, weights) more = Cast <to = 1> (missing)"
        },
        {"nan": USUAL["nan"] + " more = Neg (weights)"},
        {"nan": USUAL["nan"] + " more = Not (missing)"},
        {"outputs": ", float[B, T, L] weights"},
        {"outputs": ", float[B, T, L] kept"},
    ],
)
def test_anything_else_stays(changes: dict[str, str]) -> None:
    """A mask that may leave NaN, or another use of what looks for it: the graph is left as it is."""
    model = parsed(**changes)  # type: ignore[arg-type]
    before = ir.serde.serialize_model(model)
    simplify_masked_softmax(model.graph)
    assert ir.serde.serialize_model(model) == before


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma3_text"])
def test_exports_look_for_no_nan(variant: str) -> None:
    """The exporter still writes a finite mask, so that no block has the two nodes."""
    types = [node.op_type for node in exported(variant).graph.proto.graph.node]
    assert types.count("Softmax") == 2
    assert "IsNaN" not in types


def test_float16_exports_look_for_nan() -> None:
    """There the lowest number and a score may be minus infinity."""
    nodes = build_graph(LoadedParts(build("llama").half())).proto.graph.node
    assert [node.op_type for node in nodes].count("IsNaN") == 2
