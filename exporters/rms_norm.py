"""RMS norms written as a division, the form that ONNX Runtime computes in one kernel.

PyTorch's exporter writes ``x * rsqrt(v)`` as a square root, a reciprocal and a product. ONNX Runtime's
SimplifiedLayerNormalization, which takes the place of a whole norm, is fused from ``x / sqrt(v)`` only. Norms of heads
go before the transposition of the heads: ONNX Runtime moves such a transposition, sometimes to the midst of the norm.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.pattern import constant, only_user, producer, replace_uses

__all__ = ["simplify_rms_norms"]


def simplify_rms_norms(graph: ir.Graph) -> None:
    """Make ``x / sqrt(v)`` of every ``x * (1 / sqrt(v))`` whose reciprocal has no other use; one rounding less.

    A transposition that leaves the last axis where it is, and that nothing but such a norm uses, goes behind the norm.
    """
    for node in list(graph):
        if node.op_type != "Reciprocal" or producer(node.inputs[0], "Sqrt") is None:
            continue
        product = only_user(node)
        if product is not None and product.op_type == "Mul":
            (reciprocal,) = node.outputs
            (scaled,) = (value for value in product.inputs if value is not reciprocal)
            product.op_type = "Div"
            product.name = f"{product.outputs[0].name}_Div"
            product.replace_input_with(0, scaled)
            product.replace_input_with(1, node.inputs[0])
            graph.remove(node, safe=True)
    for node in list(graph):
        norm = _norm(node) if node.op_type == "Transpose" and _keeps_last_axis(node) else []
        if norm:
            _transpose_behind(graph, node, norm)


def _keeps_last_axis(transpose: ir.Node) -> bool:
    perm = list(transpose.attributes["perm"].as_ints())
    return perm[-1] == len(perm) - 1


def _norm(transpose: ir.Node) -> list[ir.Node]:
    """The nodes of the norm over the last axis that alone uses the transposed value; none if that is not certain."""
    x = transpose.outputs[0]
    users = {use.node.op_type: use.node for use in x.uses() if use.idx == 0}
    if len(x.uses()) != 2 or users.keys() != {"Pow", "Div"} or x.is_graph_output():
        return []
    nodes = [users["Pow"]]
    for op_type in ("ReduceMean", "Add", "Sqrt", "Div", "Mul"):
        node = only_user(nodes[-1])
        if node is None or node.op_type != op_type:
            return []
        nodes.append(node)
    power, mean, plus, _, quotient, product = nodes
    numbers = [power.inputs[1], *(value for value in plus.inputs if value is not mean.outputs[0])]
    (weight,) = (value for value in product.inputs if value is not quotient.outputs[0])
    if quotient is not users["Div"] or constant(mean.inputs[1]) != [-1] or any(_rank(v) for v in numbers):
        return []
    if _rank(weight) > 1 or mean.attributes["keepdims"].as_int() != 1 or product.outputs[0].is_graph_output():
        return []
    return nodes


def _rank(value: ir.Value | None) -> int:
    """How many axes a value has; of one that is not known, more than any."""
    return len(value.shape) if value is not None and value.shape is not None else 1 << 31


def _transpose_behind(graph: ir.Graph, transpose: ir.Node, norm: list[ir.Node]) -> None:
    """Take the norm of what is transposed, and transpose the result."""
    result, x = norm[-1].outputs[0], transpose.inputs[0]
    assert x is not None
    output = ir.Value(name=f"{result.name}_transposed", type=result.type, shape=result.shape)
    replace_uses(result, output)
    replace_uses(transpose.outputs[0], x)
    graph.remove(transpose, safe=True)
    perm = transpose.attributes["perm"]
    behind = ir.Node("", "Transpose", [result], [perm], outputs=[output], name=f"{output.name}_Transpose")
    graph.insert_after(norm[-1], behind)
    for node in norm:
        node.outputs[0].shape = None
