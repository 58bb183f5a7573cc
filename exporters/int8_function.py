"""The product with a dense int8 matrix in standard operators, as a function that the model itself carries.

Where the runtime library is not there, ONNX Runtime runs this in its place. What turns the matrix round is worked out
when the model is loaded, so that a run multiplies integers by integers; the copy takes as much memory as the matrix.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from exporters.packed_function import DOMAIN, MIN_OPSET, ROUNDED_INPUTS

__all__ = ["INT8_OPERATOR", "int8_function", "is_int8_product"]

INT8_OPERATOR = "Int8MatMul"

_TEXT = """
<domain: "{domain}", opset_import: ["": {opset}]>
{operator} <activation_bits> (x, weight, scales, bias) => (y)
{{
  one = Constant <value = int64[1] {{1}}> ()
  rest = Constant <value = int64[1] {{-1}}> ()
  N = Shape <start = 0, end = 1> (weight)
  K = Shape <start = 1, end = 2> (weight)
  leading = Shape <start = 0, end = -1> (x)
  as_rows = Concat <axis = 0> (rest, K)
  x_rows = Reshape (x, as_rows)
  columns_first = Transpose <perm = [1, 0]> (weight)
{product}
  y_scaled = Mul (y_steps, scales)
  y_rows = Add (y_scaled, bias)
  y_shape = Concat <axis = 0> (leading, N)
  y = Reshape <allowzero = 1> (y_rows, y_shape)
}}
"""
# Integers are multiplied as uint8, 128 more than they are: of uint8 by int8, ONNX Runtime's sums saturate on processors
# without VNNI, and int8 by int8 is thirty times slower. Another top bit adds 128.
_ROUNDED = """
  zero_float = Constant <value = float {{0}}> ()
  middle = Constant <value = float {{128}}> ()
  middle_uint8 = Constant <value = uint8 {{128}}> ()
{rounding}
  weight_bits = Cast <to = {uint8}> (columns_first)
  weight_uint8 = BitwiseXor (weight_bits, middle_uint8)
  x_shifted = Add (x_used, middle)
  x_uint8 = Cast <to = {uint8}> (x_shifted)
  sums = MatMulInteger (x_uint8, weight_uint8, middle_uint8, middle_uint8)
  sums_float = Cast <to = {float}> (sums)
  y_steps = Mul (sums_float, x_step)
"""
_PLAIN = """
  weight_float = Cast <to = {float}> (columns_first)
  y_steps = MatMul (x_rows, weight_float)
"""


def is_int8_product(node: onnx.NodeProto) -> bool:
    """Whether the node is this operator."""
    return bool(node.domain == DOMAIN and node.op_type == INT8_OPERATOR)


def int8_function(*, activation_bits: int, opset: int) -> onnx.FunctionProto:
    """The operator as a function.

    Args:
        activation_bits: 8: x is rounded row by row first, as FORMAT.md says; 32: it is used as it is.
        opset: The model's.
    """
    product = (_ROUNDED if activation_bits == 8 else _PLAIN).format(
        rounding=ROUNDED_INPUTS, uint8=int(TensorProto.UINT8), float=int(TensorProto.FLOAT)
    )
    text = _TEXT.format(domain=DOMAIN, opset=max(opset, MIN_OPSET), operator=INT8_OPERATOR, product=product)
    function: onnx.FunctionProto = onnx.parser.parse_function(text)
    return function
