"""The operators of packed weights in standard operators, as functions that the model itself carries.

Where the runtime library is not there, ONNX Runtime runs this in its place: the same numbers, slowly. Rows are
unpacked in strips of bounded size, anew in each call, so that it takes little memory beyond the packed weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx
from onnx import TensorProto

from exporters.packing import PIECE_COLUMNS, STRIP_ROWS

DOMAIN = "blockpress"
OPERATOR = "SparseMatMul"
# The inputs of each weight; those of an operator with several weights follow one another behind x.
WEIGHT_INPUTS = ("mask", "values", "offsets", "scales", "bias")
MOST_WEIGHTS = 3
EXPERT_OPERATOR = "SparseExpertMatMul"
DOMAIN_VERSION = 1
STRIP_ELEMENTS = 2**19  # weights that are unpacked at a time: about 30 bytes each while they are
MIN_OPSET = 18  # BitwiseAnd, and the axes of ReduceMax as an input

_HEAD = """
<domain: "{domain}", opset_import: ["": {opset}]>
{operator} <columns, group_size, activation_bits, format_version>
(x, mask, values, offsets, scales, bias) => (y)
{{
  zero = Constant <value = int64[1] {{0}}> ()
  one = Constant <value = int64[1] {{1}}> ()
  two = Constant <value = int64[1] {{2}}> ()
  minus_one = Constant <value = int64[1] {{-1}}> ()
  eight = Constant <value = int64[1] {{8}}> ()
  sixteen = Constant <value = int64[1] {{{strip_rows}}}> ()
  unit = Constant <value = int64[1] {{{unit}}}> ()
  piece = Constant <value = int64[1] {{{piece}}}> ()
  budget = Constant <value = int64[1] {{{strip_elements}}}> ()
  zero_byte = Constant <value = uint8 {{0}}> ()
  one_byte = Constant <value = uint8 {{1}}> ()
  half_byte = Constant <value = uint8 {{15}}> ()
  bit_places = Constant <value = uint8[8] {{0, 1, 2, 3, 4, 5, 6, 7}}> ()
  zero_float = Constant <value = float {{0}}> ()
  scalar_zero = Constant <value = int64 {{0}}> ()
  scalar_two = Constant <value = int64 {{2}}> ()
  one_int = Constant <value = int32 {{1}}> ()
  two_int = Constant <value = int32 {{2}}> ()
  K_scalar = Constant <value_int: int = @columns> ()
  K = Unsqueeze (K_scalar, zero)
  N = Shape <start = 0, end = 1> (mask)
  K_sum = Add (K, unit)
  K_less = Sub (K_sum, one)
  units = Div (K_less, unit)
  K_filled = Mul (units, unit)
  mask_columns = Div (K_filled, eight)
  mask_given = Shape <start = 1, end = 2> (mask)
  mask_lacking = Sub (mask_columns, mask_given)
  strip_cost = Mul (sixteen, K_filled)
  strips_at_once = Div (budget, strip_cost)
  at_least_one = Max (strips_at_once, one)
  R = Mul (sixteen, at_least_one)
  N_sum = Add (N, R)
  N_less = Sub (N_sum, one)
  trips = Div (N_less, R)
  trip_count = Squeeze (trips, zero)
  N_filled = Mul (trips, R)
  in_pieces = Concat <axis = 0> (R, minus_one, piece)
  in_rows = Concat <axis = 0> (R, K_filled)
  all_rows = Concat <axis = 0> (N, one)
  row_scales = Expand (scales, all_rows)
  leading = Shape <start = 0, end = -1> (x)
  as_rows = Concat <axis = 0> (minus_one, K)
  x_rows = Reshape (x, as_rows)
  M = Shape <start = 0, end = 1> (x_rows)
{activations}
  go_on = Constant <value = bool {{1}}> ()
  strips = Loop (trip_count, go_on) <body = strip (int64 trip, bool before) => (bool after, strip_y) {{
    after = Identity (before)
    trip_row = Unsqueeze (trip, zero)
    start = Mul (trip_row, R)
    stop_free = Add (start, R)
    stop = Min (stop_free, N)
    rows = Sub (stop, start)
    lacking = Sub (R, rows)
    mask_pads = Concat <axis = 0> (zero, zero, lacking, mask_lacking)
    scale_pads = Concat <axis = 0> (zero, zero, lacking, zero)
    some_mask = Slice (mask, start, stop, zero)
    strip_mask = Pad (some_mask, mask_pads, zero_byte)
    mask_3d = Unsqueeze (strip_mask, two)
    shifted = BitShift <direction = "RIGHT"> (mask_3d, bit_places)
    bits = BitwiseAnd (shifted, one_byte)
    bit_pieces = Reshape (bits, in_pieces)
    kept = Cast <to = {bool}> (bit_pieces)
    ones = Cast <to = {int32}> (bit_pieces)
    first_strip = Div (start, sixteen)
    base = Gather (offsets, first_strip)
{values}
    weights = Where (kept, stored, zero_float)
    some_scales = Slice (row_scales, start, stop, zero)
    strip_scales = Pad (some_scales, scale_pads, zero_float)
{scaling}
    W = Slice (scaled, zero, K, one)
    W_transposed = Transpose <perm = [1, 0]> (W)
    strip_y = MatMul (x_used, W_transposed)
  }}>
  by_row = Transpose <perm = [1, 0, 2]> (strips)
  joined_shape = Concat <axis = 0> (M, N_filled)
  joined = Reshape <allowzero = 1> (by_row, joined_shape)
  y_rows = Slice (joined, zero, N, one)
{rescaling}
  y_biased = Add (y_scaled, bias)
  y_shape = Concat <axis = 0> (leading, N)
  y = Reshape <allowzero = 1> (y_biased, y_shape)
}}
"""

_ACTIVATIONS_FLOAT = "  x_used = Identity (x_rows)"
# Each row of x_rows (M, K) to whole steps of its own, for a function that has ``one`` (int64 [1]) and ``zero_float``.
ROUNDED_INPUTS = """
  largest_int8 = Constant <value = float {127}> ()
  one_float = Constant <value = float {1}> ()
  x_magnitudes = Abs (x_rows)
  x_largest = ReduceMax <keepdims = 1> (x_magnitudes, one)
  x_step_or_zero = Div (x_largest, largest_int8)
  x_is_zero = Equal (x_step_or_zero, zero_float)
  x_step = Where (x_is_zero, one_float, x_step_or_zero)
  x_steps = Div (x_rows, x_step)
  x_used = Round (x_steps)
"""
_RESCALING_FLOAT = "  y_scaled = Identity (y_rows)"
_RESCALING_INT8 = "  y_scaled = Mul (y_rows, x_step)"

_VALUES = """
    ones_flat = Reshape (ones, minus_one)
    counted = CumSum (ones_flat, scalar_zero)
    ranks = Sub (counted, one_int)
    ranks_long = Cast <to = {int64}> (ranks)
    places_flat = Add (ranks_long, base)
    places = Reshape (places_flat, in_pieces)
    found = Gather (values, places)
    stored = Cast <to = {float}> (found)
"""
_VALUES_INT4 = """
    shift_step = Constant <value = int32 {{4}}> ()
    middle = Constant <value = float {{8}}> ()
    piece_counts = ReduceSum <keepdims = 1> (ones, two)
    piece_counts_up = Add (piece_counts, one_int)
    piece_bytes = Div (piece_counts_up, two_int)
    piece_shape = Shape (piece_bytes)
    piece_bytes_flat = Reshape (piece_bytes, minus_one)
    begins_flat = CumSum <exclusive = 1> (piece_bytes_flat, scalar_zero)
    begins = Reshape (begins_flat, piece_shape)
    ranks = CumSum <exclusive = 1> (ones, scalar_two)
    rank_bytes = Div (ranks, two_int)
    places_int = Add (begins, rank_bytes)
    places_long = Cast <to = {int64}> (places_int)
    places = Add (places_long, base)
    found = Gather (values, places)
    even_ranks = Mul (rank_bytes, two_int)
    odd = Sub (ranks, even_ranks)
    half_shift_int = Mul (odd, shift_step)
    half_shift = Cast <to = {uint8}> (half_shift_int)
    found_shifted = BitShift <direction = "RIGHT"> (found, half_shift)
    halves = BitwiseAnd (found_shifted, half_byte)
    halves_float = Cast <to = {float}> (halves)
    stored = Sub (halves_float, middle)
"""
_SCALING = """
    weight_rows = Reshape (weights, in_rows)
    scaled = Mul (weight_rows, strip_scales)
"""
_SCALING_GROUPS = """
    in_groups = Concat <axis = 0> (R, minus_one, unit)
    weight_groups = Reshape (weights, in_groups)
    group_scales = Unsqueeze (strip_scales, two)
    scaled_groups = Mul (weight_groups, group_scales)
    scaled = Reshape (scaled_groups, in_rows)
"""


_ATTRIBUTES = ("columns", "group_size", "activation_bits", "format_version")

_EXPERTS = """
  zero = Constant <value = int64[1] {{0}}> ()
  one = Constant <value = int64[1] {{1}}> ()
  of_all = {domain}.{operator} <{passed}> (x, {given})
  N_scalar = Constant <value_int: int = @expert_rows> ()
  N = Unsqueeze (N_scalar, zero)
  all_rows = Shape <start = 0, end = 1> (mask)
  E = Div (all_rows, N)
  T_scalar = Size (experts)
  T = Unsqueeze (T_scalar, zero)
  expert_shape = Concat <axis = 0> (T, E, N)
  by_expert = Reshape <allowzero = 1> (of_all, expert_shape)
  column = Concat <axis = 0> (T, one)
  chosen = Reshape <allowzero = 1> (experts, column)
  y_rows = GatherND <batch_dims = 1> (by_expert, chosen)
  leading = Shape (experts)
  y_shape = Concat <axis = 0> (leading, N)
  y = Reshape <allowzero = 1> (y_rows, y_shape)
"""


def operator_name(weights: int) -> str:
    """The operator that multiplies x by 1 to MOST_WEIGHTS weights."""
    return OPERATOR if weights == 1 else f"{OPERATOR}{weights}"


def is_packed_product(node: onnx.NodeProto) -> bool:
    """Whether the node is one of these operators."""
    return node.domain == DOMAIN and (
        is_expert_product(node) or node.op_type in map(operator_name, range(1, MOST_WEIGHTS + 1))
    )


def is_expert_product(node: onnx.NodeProto) -> bool:
    """Whether the node is the operator of experts, whose second input says which one each row of x goes to."""
    return bool(node.domain == DOMAIN and node.op_type == EXPERT_OPERATOR)


def first_weight_input(node: onnx.NodeProto) -> int:
    """The place of the first weight's first input in one of these operators."""
    return 2 if is_expert_product(node) else 1


def weight_inputs(node: onnx.NodeProto) -> list[list[str]]:
    """The names of each weight's inputs, in the order of WEIGHT_INPUTS; the last may lack some in a broken file."""
    inputs = list(node.input[first_weight_input(node) :])
    return [inputs[start : start + len(WEIGHT_INPUTS)] for start in range(0, len(inputs), len(WEIGHT_INPUTS))]


def fallback_functions(
    operators: Collection[str], *, int4: bool, group_size: int, activation_bits: int, opset: int
) -> list[onnx.FunctionProto]:
    """``fallback_function``, and those of the other ``operators``, which call it."""
    functions = [
        fallback_function(int4=int4, group_size=group_size, activation_bits=activation_bits, opset=opset)
    ]
    own_opset = max(opset, MIN_OPSET)
    for weights in range(2, MOST_WEIGHTS + 1):
        if operator_name(weights) in operators:
            functions.append(_several(weights, own_opset))
    if EXPERT_OPERATOR in operators:
        functions.append(_of_experts(own_opset))
    return functions


def _several(weights: int, opset: int) -> onnx.FunctionProto:
    """The operator with several weights as that with one, for each of them."""
    numbers = range(1, weights + 1)
    given = {number: ", ".join(f"{name}{number}" for name in WEIGHT_INPUTS) for number in numbers}
    products = [f"  y{n} = {DOMAIN}.{OPERATOR} <{_passed()}> (x, {given[n]})" for n in numbers]
    return _calling_function(
        operator_name(weights),
        _ATTRIBUTES,
        ["x", *given.values()],
        [f"y{number}" for number in numbers],
        "\n".join(products),
        opset,
    )


def _of_experts(opset: int) -> onnx.FunctionProto:
    """The operator of experts as the product with all of them, whose outputs are held, and each row's own taken."""
    given = ", ".join(WEIGHT_INPUTS)
    body = _EXPERTS.format(domain=DOMAIN, operator=OPERATOR, passed=_passed(), given=given)
    attributes = (*_ATTRIBUTES, "expert_rows")
    return _calling_function(EXPERT_OPERATOR, attributes, ["x", "experts", given], ["y"], body, opset)


def _passed() -> str:
    return ", ".join(f"{name}: int = @{name}" for name in _ATTRIBUTES)


def _calling_function(
    name: str, attributes: Sequence[str], inputs: Sequence[str], outputs: Sequence[str], body: str, opset: int
) -> onnx.FunctionProto:
    """A function of the domain that calls another one of it."""
    function: onnx.FunctionProto = onnx.parser.parse_function(
        f"""<domain: "{DOMAIN}", opset_import: ["": {opset}, "{DOMAIN}": {DOMAIN_VERSION}]>
{name} <{", ".join(attributes)}>
({", ".join(inputs)}) => ({", ".join(outputs)})
{{
{body}
}}
"""
    )
    return function


def fallback_function(*, int4: bool, group_size: int, activation_bits: int, opset: int) -> onnx.FunctionProto:
    """The operator as a function. A name has one function, so all packed weights of a model are of one kind.

    Args:
        int4: Whether a byte of the values holds two weights.
        group_size: Columns that share a scale; 0 for whole rows.
        activation_bits: 32, or 8: the inputs are rounded row by row first.
        opset: The model's.
    """
    types = {
        "bool": int(TensorProto.BOOL),
        "int32": int(TensorProto.INT32),
        "int64": int(TensorProto.INT64),
        "uint8": int(TensorProto.UINT8),
        "float": int(TensorProto.FLOAT),
    }
    text = _HEAD.format(
        domain=DOMAIN,
        operator=OPERATOR,
        opset=max(opset, MIN_OPSET),
        strip_rows=STRIP_ROWS,
        unit=group_size or PIECE_COLUMNS,
        piece=PIECE_COLUMNS,
        strip_elements=STRIP_ELEMENTS,
        activations=ROUNDED_INPUTS if activation_bits == 8 else _ACTIVATIONS_FLOAT,
        rescaling=_RESCALING_INT8 if activation_bits == 8 else _RESCALING_FLOAT,
        values=(_VALUES_INT4 if int4 else _VALUES).format(**types),
        scaling=_SCALING_GROUPS if group_size else _SCALING,
        **types,
    )
    function: onnx.FunctionProto = onnx.parser.parse_function(text)
    return function
