"""The nodes that take the place of a product with, or a look-up in, a weight that is packed or stored as int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from exporters.int8_function import INT8_OPERATOR
from exporters.packed_function import DOMAIN, EXPERT_OPERATOR, MOST_WEIGHTS, operator_name
from exporters.packing import FORMAT_VERSION

MASK, VALUES, OFFSETS, SCALES = ".mask", ".values", ".offsets", ".scales"
NO_SCALES, NO_BIAS = "packed/no_scales", "packed/no_bias"
LAST_AXIS = "packed/last_axis"


@dataclass(frozen=True)
class Product:
    """A matrix product ``output = x · W + bias`` in the graph, whichever operator makes it.

    Attributes:
        node: The node.
        x: What is multiplied.
        output: The result.
        bias: (N,), or None.
        rows_first: Whether the graph's W is (N, K) rather than (K, N).
        name: Of the node.
    """

    node: NodeProto
    x: str
    output: str
    bias: str | None
    rows_first: bool
    name: str


@dataclass(frozen=True)
class ExpertProduct:
    """Rows of x, each times the matrix of the expert that it goes to: ``output[t] = W[experts[t]] · x[t]``.

    Attributes:
        nodes: Those that make it: the choice of the matrices, the product, the removal of its last axis.
        x: (T, K).
        experts: (T,) int64.
        output: (T, N).
        name: Of the product's node.
    """

    nodes: tuple[NodeProto, NodeProto, NodeProto]
    x: str
    experts: str
    output: str
    name: str


@dataclass(frozen=True)
class PackedForm:
    """How a weight that is multiplied is packed.

    Attributes:
        weight: Its name.
        rows: N, of each expert where there are several.
        columns: K.
        group_size: As in the format.
        scaled: Whether it has scales.
        float_type: What the graph computes in.
    """

    weight: str
    rows: int
    columns: int
    group_size: int
    scaled: bool
    float_type: int

    def inputs(self, bias: str) -> list[str]:
        """The operator's inputs for it."""
        scales = f"{self.weight}{SCALES}" if self.scaled else NO_SCALES
        return [f"{self.weight}{MASK}", f"{self.weight}{VALUES}", f"{self.weight}{OFFSETS}", scales, bias]

    def attributes(self, activation_bits: int) -> dict[str, int]:
        """The operator's attributes."""
        return {
            "format_version": FORMAT_VERSION,
            "columns": self.columns,
            "group_size": self.group_size,
            "activation_bits": activation_bits,
        }


@dataclass(frozen=True)
class PackedProduct:
    """A product, and the packed weight in it."""

    product: Product
    form: PackedForm

    @property
    def shared(self) -> tuple[object, ...]:
        """What must be the same in all products of one operator."""
        return (self.product.x, self.form.columns, self.form.group_size, self.form.float_type)


@dataclass(frozen=True)
class Lookup:
    """Rows of an embedding: ``output = W[ids]``."""

    node: NodeProto
    ids: str
    output: str
    name: str


def shared_constants() -> list[TensorProto]:
    """Initializers that all packed products may name."""
    constants = {
        NO_SCALES: np.ones((1, 1), np.float32),
        NO_BIAS: np.zeros(1, np.float32),
        LAST_AXIS: np.array([-1], np.int64),
    }
    return [numpy_helper.from_array(array, name) for name, array in constants.items()]


def packed_products(products: Sequence[PackedProduct], activation_bits: int) -> list[NodeProto]:
    """One operator that makes all these products, between casts where the graph computes in float16.

    Args:
        products: Up to MOST_WEIGHTS, with the same ``shared``. The operator has the name of the first.
        activation_bits: As in the format.
    """
    first, form = products[0], products[0].form
    if len(products) > MOST_WEIGHTS or len({product.shared for product in products}) != 1:
        raise ValueError("these products cannot be made by one operator")
    before, after, x = [], [], first.product.x
    if form.float_type != TensorProto.FLOAT:
        x = f"{first.product.name}/x_float32"
        before.append(_node("Cast", [first.product.x], x, to=TensorProto.FLOAT))
    inputs, outputs = [x], []
    for packed in products:
        product = packed.product
        output, bias = product.output, product.bias or NO_BIAS
        if form.float_type != TensorProto.FLOAT:
            output = f"{product.name}/y_float32"
            after.append(_node("Cast", [output], product.output, to=form.float_type))
            if product.bias is not None:
                bias = f"{product.name}/bias_float32"
                before.append(_node("Cast", [product.bias], bias, to=TensorProto.FLOAT))
        inputs += packed.form.inputs(bias)
        outputs.append(output)
    operator = helper.make_node(
        operator_name(len(products)),
        inputs,
        outputs,
        name=first.product.name,
        domain=DOMAIN,
        **form.attributes(activation_bits),
    )
    return [*before, operator, *after]


def packed_experts(product: ExpertProduct, form: PackedForm, activation_bits: int) -> list[NodeProto]:
    """The operator of experts, between casts where the graph computes in float16."""
    nodes, x, output = [], product.x, product.output
    if form.float_type != TensorProto.FLOAT:
        x, output = f"{product.name}/x_float32", f"{product.name}/y_float32"
        nodes.append(_node("Cast", [product.x], x, to=TensorProto.FLOAT))
    operator = helper.make_node(
        EXPERT_OPERATOR,
        [x, product.experts, *form.inputs(NO_BIAS)],
        [output],
        name=product.name,
        domain=DOMAIN,
        expert_rows=form.rows,
        **form.attributes(activation_bits),
    )
    nodes.append(operator)
    if output != product.output:
        nodes.append(_node("Cast", [output], product.output, to=form.float_type))
    return nodes


def int8_product(product: Product, weight: str, activation_bits: int) -> NodeProto:
    """The operator that multiplies by a matrix (N, K) of int8, whose rows have a scale each.

    With 8 activation bits the input is rounded as the format says; with 32 it is used as it is.
    """
    return helper.make_node(
        INT8_OPERATOR,
        [product.x, weight, f"{weight}{SCALES}", product.bias or NO_BIAS],
        [product.output],
        name=product.name,
        domain=DOMAIN,
        activation_bits=activation_bits,
    )


def int8_lookup(lookup: Lookup, weight: str) -> list[NodeProto]:
    """Rows of an int8 embedding (V, D), each times its scale; the ids are (batch, tokens)."""
    at = lookup.name
    return [
        _node("Gather", [weight, lookup.ids], f"{at}/rows", axis=0),
        _node("Cast", [f"{at}/rows"], f"{at}/rows_float32", to=TensorProto.FLOAT),
        _node("Gather", [f"{weight}{SCALES}", lookup.ids], f"{at}/row_scales", axis=0),
        _node("Unsqueeze", [f"{at}/row_scales", LAST_AXIS], f"{at}/row_scale"),
        _node("Mul", [f"{at}/rows_float32", f"{at}/row_scale"], lookup.output),
    ]


def _node(operator: str, inputs: Sequence[str], output: str, **attributes: object) -> NodeProto:
    node: onnx.NodeProto = helper.make_node(
        operator, inputs, [output], name=f"{output}/{operator}", **attributes
    )
    return node
