"""Attention over a key-value cache as one node, for what computes it in one pass.

The exporter writes the attention of a decoder block as some 35 small nodes: rotary embedding, joining of the cache,
scores, mask, softmax, values, and the transposes and reshapes around. For one token the overhead of that many nodes
exceeds their arithmetic. See ``attention_function`` for what the node means.
Source: GQA, arXiv 2305.13245; RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from exporters.attention_function import CACHED_ATTENTION, ROTARY_ATTENTION, attention_function
from exporters.heads_by_token import SWAP_MIDDLE, HeadsByToken
from exporters.packed_function import DOMAIN
from exporters.pattern import constant, only_user, permutes, producer, remove_unused, replace_uses, sizes_of
from exporters.rotated_heads import RotatedHeads, rotated_heads

__all__ = ["attention_functions", "join_cached_attention"]

_SWAP_LAST = (0, 1, 3, 2)

_ROWS = "rows"  # says of a node whether the queries of a key head were rows of one matrix

_Size = int | str


@dataclass(frozen=True)
class _Factor:
    """What a factor of a product, or the scores, are made of.

    Attributes:
        value: Without the steps that follow.
        number: The product of the numbers that it is multiplied by.
        heads: To how many heads it is regrouped.
        swapped: Whether its last two axes change places.
    """

    value: ir.Value
    number: float
    heads: int | None
    swapped: bool


@dataclass(frozen=True)
class _Cache:
    """An input of the graph with new rows behind the old ones: an output of the graph."""

    past: ir.Value
    new: ir.Value
    joined: ir.Value


@dataclass(frozen=True)
class _Scores:
    """Scores before the mask: `query` (B, H, S, D) times the keys, scaled; `heads` by which both are regrouped."""

    query: ir.Value
    keys: _Cache
    scale: float
    heads: tuple[int | None, int | None]


@dataclass(frozen=True)
class _Weighted:
    """The weighted values: `by_token` is (B, S, H, Dv), and `last` reshapes it to (B, S, H Dv) or to rows."""

    values: _Cache
    by_token: ir.Node
    last: ir.Node
    heads: tuple[int | None, int | None]


@dataclass(frozen=True)
class _Sizes:
    """The fixed sizes, and the names of the others."""

    batch: _Size
    length: _Size
    heads: int
    kv_heads: int
    width: int
    value_width: int


def join_cached_attention(graph: ir.Graph) -> None:
    """Put one node in the place of each attention whose every step is known; float32 only."""
    for node in list(graph):
        if node.op_type == "Softmax" and _is_of_last_axis(node):
            _join(graph, node)


def attention_functions(graph: ir.Graph, opset: int) -> tuple[onnx.FunctionProto, ...]:
    """The functions of the operators that ``join_cached_attention`` put into the graph, as its nodes need them."""
    made = []
    for operator in (CACHED_ATTENTION, ROTARY_ATTENTION):
        nodes = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, operator)]
        if nodes:
            entering = {
                name: [len(sizes_of(node.inputs[place])) for node in nodes]
                for place, name in enumerate("qkv")
            }
            made.append(
                attention_function(
                    operator,
                    rows=any(node.meta[_ROWS] for node in nodes),
                    widths=_rotated_widths(nodes) if operator == ROTARY_ATTENTION else (),
                    apart=[name for name, ranks in entering.items() if set(ranks) == {4}],
                    opset=opset,
                )
            )
    return tuple(made)


def _rotated_widths(nodes: Sequence[ir.Node]) -> set[int]:
    """How many columns the nodes rotate, if not all of them rotate whole heads."""
    pairs = [(sizes_of(node.inputs[6])[-1], sizes_of(node.outputs[1])[-1]) for node in nodes]
    return {int(width or 0) for width, _ in pairs} if any(one != other for one, other in pairs) else set()


def _join(graph: ir.Graph, softmax: ir.Node) -> None:
    added, weighted = producer(softmax.inputs[0], "Add"), _weighted(softmax)
    if added is None or weighted is None or only_user(added) is None:
        return
    for scored, mask in (added.inputs, added.inputs[::-1]):
        scores = _scores(scored)
        if scores is not None and mask is not None:
            sizes = _checked_sizes(scores, weighted, mask)
            if sizes is not None:
                _replace(graph, scores, weighted, mask, sizes)
            return


def _is_of_last_axis(softmax: ir.Node) -> bool:
    axis = softmax.attributes.get("axis")
    return axis is None or axis.as_int() in (-1, 3)


def _scores(value: ir.Value | None) -> _Scores | None:
    """The scores that the value is; none if that is not certain."""
    outer = _factor(value)
    product = producer(outer.value, "MatMul") if outer is not None and not outer.swapped else None
    if outer is None or product is None or only_user(product) is None:
        return None
    query, keys = _factor(product.inputs[0]), _factor(product.inputs[1])
    if query is None or query.swapped or keys is None or not keys.swapped or keys.heads is not None:
        return None
    joined = _joined_cache(keys.value)
    if joined is None:
        return None
    return _Scores(query.value, joined, outer.number * query.number * keys.number, (query.heads, outer.heads))


def _factor(value: ir.Value | None) -> _Factor | None:
    """The value back to what it is made of by numbers, one regrouping and one swap of the last axes."""
    number, heads, swapped = 1.0, None, False
    while value is not None:
        node = value.producer()
        if node is None or only_user(node) is None:
            break
        scaled, regrouped = _scaled(node), _regrouped(node)
        if scaled is not None:
            value, number = scaled[0], number * scaled[1]
        elif regrouped is not None and heads is None:
            value, heads = node.inputs[0], regrouped
        elif permutes(node, _SWAP_LAST) and not swapped:
            value, swapped = node.inputs[0], True
        else:
            break
    return None if value is None else _Factor(value, number, heads, swapped)


def _scaled(node: ir.Node) -> tuple[ir.Value, float] | None:
    """What the node multiplies by a number, and the number."""
    if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    for place in (1, 0) if node.op_type == "Mul" else (1,):
        number, value = _number(node.inputs[place]), node.inputs[1 - place]
        if number is not None and value is not None and _number(value) is None:
            return value, number if node.op_type == "Mul" else 1 / number
    return None


def _number(value: ir.Value | None) -> float | None:
    """The one number of a constant, neither zero nor infinite."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    if len(value.const_value.shape) > 1 or value.const_value.dtype != ir.DataType.FLOAT:
        return None
    number = float(value.const_value.numpy().reshape(()))
    return number if math.isfinite(number) and number != 0 else None


def _regrouped(node: ir.Node | None) -> int | None:
    """To how many heads a reshape regroups the rows, as ``grouped_query`` writes it."""
    if node is None or node.op_type != "Reshape" or _allows_zero(node):
        return None
    shape = constant(node.inputs[1])
    return shape[1] if shape is not None and len(shape) == 4 and shape == [0, shape[1], -1, 0] else None


def _allows_zero(reshape: ir.Node) -> bool:
    allowed = reshape.attributes.get("allowzero")
    return allowed is not None and allowed.as_int() != 0


def _joined_cache(value: ir.Value | None) -> _Cache | None:
    """The cache that the value is, if it is used once besides being an output."""
    joined = producer(value, "Concat")
    if value is None or joined is None or len(joined.inputs) != 2:
        return None
    past, new = joined.inputs
    if past is None or new is None or not past.is_graph_input() or past.dtype != ir.DataType.FLOAT:
        return None
    if joined.attributes["axis"].as_int() not in (-2, 2) or not value.is_graph_output():
        return None
    return _Cache(past, new, value) if len(value.uses()) == 1 else None


def _weighted(softmax: ir.Node) -> _Weighted | None:
    """What becomes of the softmax; none if that is not the weighted values by token."""
    inner, outer = None, None
    node = only_user(softmax)
    if node is not None and _regrouped(node) is not None:
        inner, node = _regrouped(node), only_user(node)
    if node is None or node.op_type != "MatMul":
        return None
    values = _joined_cache(node.inputs[1])
    if values is None:
        return None
    node = only_user(node)
    while node is not None and node.op_type == "Reshape":
        regrouped = _regrouped(node)
        if regrouped is not None and outer is None:
            outer = regrouped
        elif not _keeps_shape(node):
            return None
        node = only_user(node)
    last = only_user(node) if node is not None and permutes(node, SWAP_MIDDLE) else None
    if node is None or last is None or last.op_type != "Reshape" or last.outputs[0].is_graph_output():
        return None
    return _Weighted(values, node, last, (inner, outer))


def _keeps_shape(reshape: ir.Node) -> bool:
    before, after = (sizes_of(value) for value in (reshape.inputs[0], reshape.outputs[0]))
    return None not in before and len(before) > 0 and before == after


def _checked_sizes(scores: _Scores, weighted: _Weighted, mask: ir.Value) -> _Sizes | None:
    """The sizes of an attention if all of its parts have those that the operator needs."""
    query, masked = sizes_of(scores.query), sizes_of(mask)
    (key, keys), (value, values) = (
        (sizes_of(cache.new), sizes_of(cache.joined)) for cache in (scores.keys, weighted.values)
    )
    if any(len(sizes) != 4 or None in sizes for sizes in (query, key, keys, value, values, masked)):
        return None
    batch, heads, length, width = query
    _, kv_heads, total, _ = keys
    value_width = value[3]
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(width, int)):
        return None
    if not isinstance(value_width, int) or batch is None or length is None or heads % kv_heads:
        return None
    found = (*scores.heads, *weighted.heads)
    regrouped = found == (kv_heads, heads, kv_heads, heads)
    if not regrouped and (found != (None,) * 4 or kv_heads not in (1, heads)):
        return None
    certain = (
        key == [batch, kv_heads, length, width]
        and keys == [batch, kv_heads, total, width]
        and value == [batch, kv_heads, length, value_width]
        and values == [batch, kv_heads, total, value_width]
        and masked[0] in (1, batch)
        and masked[1] in (1, heads)
        and masked[2] in (1, length)
        and masked[3] == total
        and mask.dtype == ir.DataType.FLOAT
    )
    sizes = _Sizes(batch, length, heads, kv_heads, width, value_width)
    return (
        sizes if certain and (_gives_tokens(weighted.last, sizes) or _takes_tokens(weighted.last)) else None
    )


def _gives_tokens(last: ir.Node, sizes: _Sizes) -> bool:
    """Whether the reshape gives (B, S, H Dv)."""
    return sizes_of(last.outputs[0]) == [sizes.batch, sizes.length, sizes.heads * sizes.value_width]


def _takes_tokens(last: ir.Node) -> bool:
    """Whether the reshape gives the same if its input is (B, S, H Dv) already."""
    shape = constant(last.inputs[1])
    return shape is not None and 0 not in shape


def _replace(graph: ir.Graph, scores: _Scores, weighted: _Weighted, mask: ir.Value, sizes: _Sizes) -> None:
    """Put the operator behind all that led to the attention, and take out what nothing uses any more."""
    last, caches = weighted.last, (scores.keys, weighted.values)
    query, key, tables = _without_rotation(scores.query, scores.keys.new, sizes)
    tokens = HeadsByToken(graph, last)
    query, scale = _without_factor(tokens.of(query), scores.scale)
    y_shape = ir.Shape([sizes.batch, sizes.length, sizes.heads * sizes.value_width])
    y = ir.Value(name=f"{last.outputs[0].name}_attention", type=caches[0].past.type, shape=y_shape)
    presents = [
        ir.Value(name=f"{cache.joined.name}_present", type=cache.past.type, shape=cache.joined.shape)
        for cache in caches
    ]
    operator = ROTARY_ATTENTION if tables else CACHED_ATTENTION
    node = ir.Node(
        DOMAIN,
        operator,
        [
            query,
            tokens.of(key),
            tokens.of(weighted.values.new),
            *(cache.past for cache in caches),
            mask,
            *tables,
        ],
        [
            ir.AttrInt64("num_heads", sizes.heads),
            ir.AttrInt64("kv_heads", sizes.kv_heads),
            ir.AttrFloat32("scale", scale),
        ],
        outputs=[y, *presents],
        name=operator,
    )
    node.meta[_ROWS] = scores.heads[0] is not None
    graph.insert_before(last, node)
    for cache, present in zip(caches, presents, strict=True):
        graph.outputs[graph.outputs.index(cache.joined)] = present
    if _gives_tokens(last, sizes):
        replace_uses(last.outputs[0], y)
        remove_unused(graph, last)
    else:
        last.replace_input_with(0, y)
        remove_unused(graph, weighted.by_token)


def _without_rotation(
    query: ir.Value, key: ir.Value, sizes: _Sizes
) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
    """Queries and keys before both are rotated by the same tables, and these; as they are, and none, otherwise."""
    of_query, of_key = rotated_heads(query), rotated_heads(key)
    if of_query is None or of_key is None or not _are_tables(of_query, sizes):
        return query, key, []
    tables = [of_query.cos, of_query.sin]
    if tables != [of_key.cos, of_key.sin]:
        return query, key, []
    return of_query.heads, of_key.heads, tables


def _without_factor(query: ir.Value, scale: float) -> tuple[ir.Value, float]:
    """The queries before they are multiplied by numbers, and the scale times these."""
    while (node := query.producer()) is not None and only_user(node) is not None:
        scaled = _scaled(node)
        if scaled is None:
            break
        scaled[0].shape = query.shape
        query, scale = scaled[0], scale * scaled[1]
    return query, scale


def _are_tables(rotated: RotatedHeads, sizes: _Sizes) -> bool:
    """Whether both tables are (B or 1, 1, S, R)."""
    cos, sin = sizes_of(rotated.cos), sizes_of(rotated.sin)
    if len(cos) != 4 or cos != sin or None in cos:
        return False
    width = cos[3]
    return (
        rotated.cos.dtype == rotated.sin.dtype == ir.DataType.FLOAT
        and cos[0] in (1, sizes.batch)
        and cos[1:3] == [1, sizes.length]
        and isinstance(width, int)
        and width <= sizes.width
        and width % 2 == 0
    )
