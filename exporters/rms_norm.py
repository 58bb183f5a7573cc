"""RMS norms written as a division, the form that ONNX Runtime computes in one kernel.

PyTorch's exporter writes ``x * rsqrt(v)`` as a square root, a reciprocal and a product. ONNX Runtime's
SimplifiedLayerNormalization, which takes the place of a whole norm, is fused from ``x / sqrt(v)`` only.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.pattern import only_user, producer

__all__ = ["simplify_rms_norms"]


def simplify_rms_norms(graph: ir.Graph) -> None:
    """Make ``x / sqrt(v)`` of every ``x * (1 / sqrt(v))`` whose reciprocal has no other use; one rounding less."""
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
