"""Arithmetic in bfloat16, for which ONNX Runtime has no CPU kernels, done in float32 with the same result."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["widen_bfloat16"]


def widen_bfloat16(graph: ir.Graph) -> None:
    """Make every node that computes in bfloat16 compute in float32 and round its results to bfloat16.

    Some models build a position bias in bfloat16 whatever dtype they are loaded in. A sum or product of two
    bfloat16 numbers, rounded from float32, is the number that bfloat16 arithmetic gives.
    """
    for node in list(graph):
        if node.op_type != "Cast":
            _widen_inputs(graph, node)
            _round_outputs(graph, node)


def _widen_inputs(graph: ir.Graph, node: ir.Node) -> None:
    for position, value in enumerate(node.inputs):
        if value is not None and value.dtype == ir.DataType.BFLOAT16:
            cast = _cast(value, ir.DataType.FLOAT)
            graph.insert_before(node, cast)
            node.replace_input_with(position, cast.outputs[0])


def _round_outputs(graph: ir.Graph, node: ir.Node) -> None:
    for value in node.outputs:
        if value.dtype == ir.DataType.BFLOAT16:
            users = list(value.uses())
            cast = _cast(value, ir.DataType.BFLOAT16)
            graph.insert_after(node, cast)
            for use in users:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    output = ir.Value(name=f"{value.name}_{dtype.name.lower()}", type=ir.TensorType(dtype), shape=value.shape)
    return ir.Node(
        "", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[output], name=f"{output.name}_Cast"
    )
