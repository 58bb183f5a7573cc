"""Rotary embeddings whose signs are in the table of sines, once, instead of in every block.

PyTorch's exporter writes ``rotate_half(x) * sin``, which is ``concat(-x2, x1) * sin`` for the halves x1 and x2 of a
head's columns, as two slices, a negation, a concatenation and a product. ``concat(x2, x1) * concat(-sin1, sin2)`` is
the same bit for bit; it splits x by one node, and all queries, keys and blocks share its second factor.
Source: RoFormer, arXiv 2104.09864, section 3.4.2; halves instead of pairs of columns are GPT-NeoX's.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.pattern import columns, only_user, producer, remove_unused, shared_constant

__all__ = ["simplify_rotary_embeddings"]


def simplify_rotary_embeddings(graph: ir.Graph) -> None:
    """Split instead of slicing and negating wherever swapped halves are multiplied by a table of their width.

    Requires opset 18, from which on Split has ``num_outputs``.
    """
    signed: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        joined = only_user(node) if node.op_type == "Neg" else None
        product = only_user(joined) if joined is not None and joined.op_type == "Concat" else None
        if joined is None or product is None or product.op_type != "Mul":
            continue
        x = _rotated_value(node, joined)
        (sine,) = (value for value in product.inputs if value is not joined.outputs[0])
        if x is None or sine is None or not _is_computed(sine) or _width(sine) != _width(x):
            continue
        if sine not in signed:
            signed[sine] = _signed(graph, sine)
        product.replace_input_with(0, _swapped_halves(graph, x, joined))
        product.replace_input_with(1, signed[sine])
        remove_unused(graph, joined)


def _rotated_value(negated: ir.Node, joined: ir.Node) -> ir.Value | None:
    """The value whose halves ``joined`` swaps, the second one negated; none if that is not certain."""
    second, first = producer(negated.inputs[0], "Slice"), producer(joined.inputs[-1], "Slice")
    if second is None or first is None or only_user(second) is not negated or only_user(first) is not joined:
        return None
    x, width = first.inputs[0], _width(first.inputs[0])
    if x is None or x.shape is None or width is None or width % 2 or second.inputs[0] is not x:
        return None
    axis = joined.attributes["axis"].as_int()
    if axis not in (-1, len(x.shape) - 1) or len(joined.inputs) != 2:
        return None
    found = [columns(node, len(x.shape), width) for node in (first, second)]
    return x if found == [range(width // 2), range(width // 2, width)] else None


def _width(value: ir.Value | None) -> int | None:
    """The size of the last axis, if it is fixed."""
    size = value.shape[-1] if value is not None and value.shape else None
    return size if isinstance(size, int) else None


def _is_computed(value: ir.Value) -> bool:
    return value.producer() is not None and value.dtype is not None


def _signed(graph: ir.Graph, sine: ir.Value) -> ir.Value:
    """Add the table with its first half negated, right behind the table."""
    maker, width, dtype = sine.producer(), _width(sine), sine.dtype
    assert maker is not None
    assert width is not None
    assert dtype is not None
    name = f"rotary_signs_{width}_{dtype.name.lower()}"
    signs = shared_constant(graph, name, np.repeat([-1, 1], width // 2).astype(dtype.numpy()))
    output = ir.Value(name=f"{sine.name}_signed", type=sine.type, shape=sine.shape)
    product = ir.Node("", "Mul", [sine, signs], outputs=[output], name=f"{output.name}_Mul")
    graph.insert_after(maker, product)
    return output


def _swapped_halves(graph: ir.Graph, x: ir.Value, joined: ir.Node) -> ir.Value:
    """Add a split of ``x`` and a concatenation of its halves, the second one first, in front of ``joined``."""
    name, width = joined.outputs[0].name, _width(x)
    assert x.shape is not None
    assert width is not None
    shape = ir.Shape([*x.shape[:-1], width // 2])
    halves = [ir.Value(name=f"{name}_{half}", type=x.type, shape=shape) for half in ("first", "second")]
    split_attributes = [ir.AttrInt64("axis", -1), ir.AttrInt64("num_outputs", 2)]
    output = ir.Value(name=f"{name}_swapped", type=x.type, shape=x.shape)
    graph.insert_before(
        joined,
        [
            ir.Node("", "Split", [x], split_attributes, outputs=halves, name=f"{name}_Split"),
            ir.Node(
                "",
                "Concat",
                halves[::-1],
                [ir.AttrInt64("axis", -1)],
                outputs=[output],
                name=f"{output.name}_Concat",
            ),
        ],
    )
    return output
