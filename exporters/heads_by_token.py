"""Heads of tokens in the order in which linears make them: all heads of a token next to each other."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from exporters.pattern import permutes, producer, sizes_of

__all__ = ["SWAP_MIDDLE", "HeadsByToken"]

SWAP_MIDDLE = (0, 2, 1, 3)


class HeadsByToken:
    """Makes heads (B, H, S, D) lie by token, (B, S, H, D) or (B, S, H D), in front of a node."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self._graph, self._before = graph, before
        self._split: dict[ir.Node, Sequence[ir.Value]] = {}

    def of(self, heads: ir.Value) -> ir.Value:
        """The heads by token; only where no node of the graph makes them so, new ones do."""
        batch, count, length, width = sizes_of(heads)
        assert isinstance(count, int)
        assert isinstance(width, int)
        maker = heads.producer()
        if maker is not None and permutes(maker, SWAP_MIDDLE):
            (by_token,) = maker.inputs
            assert by_token is not None
            apart = producer(by_token, "Reshape")
            joined = None if apart is None else apart.inputs[0]
            if joined is not None and sizes_of(joined) == [batch, length, count * width]:
                return joined
            by_token.shape = ir.Shape([batch, length, count, width])
            return by_token
        if maker is not None and _splits_transposed(maker):
            if maker not in self._split:
                self._split[maker] = self._split_by_token(maker)
            part = self._split[maker][heads.index() or 0]
            part.shape = ir.Shape([batch, length, count, width])
            return part
        name = f"{heads.name}_by_token"
        output = ir.Value(name=name, type=heads.type, shape=ir.Shape([batch, length, count, width]))
        order = [ir.AttrInt64s("perm", SWAP_MIDDLE)]
        self._insert(ir.Node("", "Transpose", [heads], order, outputs=[output], name=f"{name}_Transpose"))
        return output

    def _split_by_token(self, split: ir.Node) -> Sequence[ir.Value]:
        """The outputs of the split of what was transposed before it."""
        transpose = producer(split.inputs[0], "Transpose")
        assert transpose is not None
        outputs = [ir.Value(name=f"{output.name}_by_token", type=output.type) for output in split.outputs]
        inputs, attributes = [transpose.inputs[0], *split.inputs[1:]], list(split.attributes.values())
        name = f"{outputs[0].name}_Split"
        self._insert(ir.Node("", "Split", inputs, attributes, outputs=outputs, name=name))
        return outputs

    def _insert(self, node: ir.Node) -> None:
        self._graph.insert_before(self._before, node)


def _splits_transposed(node: ir.Node) -> bool:
    """Whether the node splits columns of what had its middle axes transposed."""
    if (
        node.op_type != "Split"
        or node.inputs[0] is None
        or not permutes(node.inputs[0].producer(), SWAP_MIDDLE)
    ):
        return False
    axis = node.attributes.get("axis")
    return axis is not None and axis.as_int() in (-1, 3)
