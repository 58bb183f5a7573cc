"""Attention's softmax without looking for NaN where a finite mask leaves none to be found.

PyTorch's exporter writes ``scaled_dot_product_attention`` with a mask of 0 and the lowest finite number, and yet it
replaces all NaN behind the softmax, as a mask of minus infinity needs it for a query that may see no key. That is two
passes over all scores, a tenth of the time of a long prompt.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.pattern import only_user, producer, remove_unused, replace_uses

__all__ = ["simplify_masked_softmax"]


def simplify_masked_softmax(graph: ir.Graph) -> None:
    """Take out what replaces NaN behind each softmax of float32 scores with a finite mask.

    In float16 the lowest number and a negative score can be minus infinity, so it stays there.
    """
    for node in list(graph):
        guard = _guard(node) if node.op_type == "Softmax" and _has_finite_mask(node) else None
        if guard is not None:
            replace_uses(guard.outputs[0], node.outputs[0])
            remove_unused(graph, guard)


def _has_finite_mask(softmax: ir.Node) -> bool:
    """Whether a choice between two finite numbers of float32 is added to the scores of the softmax."""
    added = producer(softmax.inputs[0], "Add")
    masks = [producer(value, "Where") for value in added.inputs] if added is not None else []
    return any(mask is not None and all(map(_is_finite, mask.inputs[1:])) for mask in masks)


def _guard(softmax: ir.Node) -> ir.Node | None:
    """The node that replaces NaN of the softmax and has its only other use; none if that is not certain."""
    users = {(use.node.op_type, use.idx): use.node for use in softmax.outputs[0].uses()}
    if users.keys() != {("IsNaN", 0), ("Where", 2)} or len(softmax.outputs[0].uses()) != 2:
        return None
    found, guard = users["IsNaN", 0], users["Where", 2]
    if only_user(found) is not guard or guard.inputs[0] is not found.outputs[0]:
        return None
    return None if softmax.outputs[0].is_graph_output() or guard.outputs[0].is_graph_output() else guard


def _is_finite(value: ir.Value | None) -> bool:
    """Whether the value is a constant of float32, one finite number."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return False
    number = value.const_value.numpy().reshape(())
    return number.dtype == np.float32 and bool(np.isfinite(number))
