"""Attention over a key-value cache as one operator, in standard operators: functions that the model itself carries.

Where the runtime library is not there, ONNX Runtime runs these in its place. It puts their nodes into the graph before
it optimises, so they are written as the exporter writes attention: the queries that share a key head are rows of one
matrix (GQA, arXiv 2305.13245), the halves of rotated columns change places (RoFormer, arXiv 2104.09864), and keys are
transposed, and queries scaled, right before their product.

Shapes, of B sequences with S new tokens behind P cached ones, T = P + S:
    q (B, S, H, D) or (B, S, H D); k (B, S, Hk, D) or (B, S, Hk D); v (B, S, Hk, Dv) or (B, S, Hk Dv)
    past_key (B, Hk, P, D), past_value (B, Hk, P, Dv); where P is 0 heads and width may be any
    mask (B or 1, H or 1, S or 1, T), which is added to the scaled scores
    cos, sin (B or 1, 1, S, R): the first R columns x of a head become x cos + swapped(x) sin, sin having signs
    y (B, S, H Dv); present_key (B, Hk, T, D), present_value (B, Hk, T, Dv)
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

from exporters.errors import ExportError
from exporters.int8_function import is_int8_product
from exporters.packed_function import DOMAIN, is_packed_product

__all__ = [
    "CACHED_ATTENTION",
    "CACHE_ROOM",
    "ROTARY_ATTENTION",
    "attention_function",
    "called_nodes",
    "is_attention",
    "is_own_operator",
]

CACHED_ATTENTION = "CachedAttention"
ROTARY_ATTENTION = "RotaryAttention"
# In the metadata of a file: "1" where the operators may be given a past with room for tokens to come (cache_room).
CACHE_ROOM = "blockpress.cache_room"
_TABLES = {CACHED_ATTENTION: "", ROTARY_ATTENTION: ", cos, sin"}

_TEXT = """
<domain: "{domain}", opset_import: ["": {opset}]>
{operator} <num_heads, kv_heads, scale>
(q, k, v, past_key, past_value, mask{tables}) => (y, present_key, present_value)
{{
  first = Constant <value = int64[1] {{0}}> ()
  kept = Constant <value = int64[2] {{0, 0}}> ()
  rest = Constant <value = int64[1] {{-1}}> ()
  flat = Constant <value = int64[3] {{0, 0, -1}}> ()
  H_scalar = Constant <value_int: int = @num_heads> ()
  H = Unsqueeze (H_scalar, first)
  Hk_scalar = Constant <value_int: int = @kv_heads> ()
  Hk = Unsqueeze (Hk_scalar, first)
  factor = Constant <value_float: float = @scale> ()
  by_query_head = Concat <axis = 0> (kept, H, rest)
  by_key_head = Concat <axis = 0> (kept, Hk, rest)
{entering}
{rotation}
  present_key = Concat <axis = -2> (past_key, {key})
  present_value = Concat <axis = -2> (past_value, v_plain)
  keys = Transpose <perm = [0, 1, 3, 2]> (present_key)
{products}
  y_tokens = Transpose <perm = [0, 2, 1, 3]> (y_heads)
  y = Reshape (y_tokens, flat)
}}
"""
_APART = "  {x}_tokens = Reshape ({x}, by_{kind}_head)\n"
_BY_HEAD = "  {x}_plain = Transpose <perm = [0, 2, 1, 3]> ({tokens})\n"
_ROWS = """
  as_queries = Concat <axis = 0> (first, H, rest, first)
  as_keys = Concat <axis = 0> (first, Hk, rest, first)
  q_rows = Reshape ({query}, as_keys)
  q_scaled = Mul (q_rows, factor)
  score_rows = MatMul (q_scaled, keys)
  scores = Reshape (score_rows, as_queries)
  masked = Add (scores, mask)
  weights = Softmax <axis = -1> (masked)
  weight_rows = Reshape (weights, as_keys)
  y_rows = MatMul (weight_rows, present_value)
  y_heads = Reshape (y_rows, as_queries)
"""
_HEADS = """
  q_scaled = Mul ({query}, factor)
  scores = MatMul (q_scaled, keys)
  masked = Add (scores, mask)
  weights = Softmax <axis = -1> (masked)
  y_heads = MatMul (weights, present_value)
"""
_ROTATION = """
  {x}_cos = Mul ({x}, cos)
  {x}_first, {x}_second = Split <axis = -1, num_outputs = 2> ({x})
  {x}_swapped = Concat <axis = -1> ({x}_second, {x}_first)
  {x}_sin = Mul ({x}_swapped, sin)
  {x}_rotated = Add ({x}_cos, {x}_sin)
"""
_END = "  end = Constant <value = int64[1] {9223372036854775807}> ()\n"
_ANY_WIDTH = "  R = Shape <start = -1> (cos)\n"
_ONE_WIDTH = (
    "  R = Constant <value = int64[1] {{{width}}}> ()\n"  # whose sizes are known before anything runs
)
_PART = """
  {x}_turned = Slice ({x}_plain, first, R, rest)
  {x}_left = Slice ({x}_plain, R, end, rest)
"""
_JOINED = "  {x}_heads = Concat <axis = -1> ({x}_turned_rotated, {x}_left)\n"


def is_attention(node: onnx.NodeProto) -> bool:
    """Whether the node is one of these operators."""
    return bool(node.domain == DOMAIN and node.op_type in _TABLES)


def is_own_operator(node: onnx.NodeProto) -> bool:
    """Whether the node is an operator of the runtime library: one of these, or of packed or int8 weights."""
    return is_attention(node) or is_packed_product(node) or is_int8_product(node)


def attention_function(
    operator: str, *, rows: bool, widths: Collection[int], apart: Collection[str], opset: int
) -> onnx.FunctionProto:
    """The operator as a function. A name has one function, so it must fit all nodes of a model.

    Args:
        operator: CACHED_ATTENTION or ROTARY_ATTENTION.
        rows: Whether the queries of a key head become rows of one matrix; else H is Hk, or Hk is 1.
        widths: How many columns of a head are rotated in the nodes of the model; none if all are, in each.
        apart: Those of q, k and v whose heads are an axis of their own in every node.
        opset: The model's.
    """
    entering = ""
    for x, kind in (("q", "query"), ("k", "key"), ("v", "key")):
        entering += "" if x in apart else _APART.format(x=x, kind=kind)
        entering += _BY_HEAD.format(x=x, tokens=x if x in apart else f"{x}_tokens")
    rotation, query, key = "", "q_plain", "k_plain"
    if operator == ROTARY_ATTENTION and widths:
        query, key = "q_heads", "k_heads"
        parts = (_PART.format(x=x) + _ROTATION.format(x=f"{x}_turned") + _JOINED.format(x=x) for x in "qk")
        width = _ONE_WIDTH.format(width=min(widths)) if len(widths) == 1 else _ANY_WIDTH
        rotation = "".join([_END, width, *parts])
    elif operator == ROTARY_ATTENTION:
        query, key = "q_plain_rotated", "k_plain_rotated"
        rotation = _ROTATION.format(x="q_plain") + _ROTATION.format(x="k_plain")
    function: onnx.FunctionProto = onnx.parser.parse_function(
        _TEXT.format(
            domain=DOMAIN,
            operator=operator,
            opset=opset,
            tables=_TABLES[operator],
            entering=entering,
            rotation=rotation,
            key=key,
            products=(_ROWS if rows else _HEADS).format(query=query),
        )
    )
    return function


def called_nodes(node: onnx.NodeProto, function: onnx.FunctionProto) -> list[onnx.NodeProto]:
    """The nodes of the operator's function as the node calls it, named after the node.

    Raises:
        ExportError: E-ONNX-PACKED: the two do not fit together, or the function has graphs inside.
    """
    given = {attribute.name: attribute for attribute in node.attribute}
    places = ((function.input, node.input), (function.output, node.output))
    if set(function.attribute) - given.keys() or any(len(one) != len(other) for one, other in places):
        raise _error(
            node, f"{len(node.input)} inputs, {len(node.output)} outputs and {len(given)} attributes"
        )
    known = {inner: outer for names in places for inner, outer in zip(*names, strict=True)} | {"": ""}
    nodes = []
    for number, inner in enumerate(function.node):
        copy = onnx.NodeProto.FromString(inner.SerializeToString())
        copy.name = f"{node.name}/{inner.op_type}_{number}"
        copy.input[:] = [known.get(name, f"{node.name}/{name}") for name in inner.input]
        copy.output[:] = [known.get(name, f"{node.name}/{name}") for name in inner.output]
        for attribute in copy.attribute:
            if attribute.HasField("g") or attribute.graphs or attribute.ref_attr_name not in (*given, ""):
                raise _error(node, "a function of another kind")
            if attribute.ref_attr_name:
                name = attribute.name
                attribute.CopyFrom(given[attribute.ref_attr_name])
                attribute.name = name
        nodes.append(copy)
    return nodes


def _error(node: onnx.NodeProto, reason: str) -> ExportError:
    return ExportError(
        "E-ONNX-PACKED", f"{node.name}: {node.op_type} with {reason}", "export the model again"
    )
