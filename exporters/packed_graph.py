"""A graph whose sparse weights are packed, and whose quantised ones are stored as integers.

The last step before the file is written: it changes the nodes that use those weights, and gives the writer the
tensors of the packed format in the place of the weights. Experts fused into one parameter of three axes are packed as
one matrix, one expert's rows below the other's. What cannot be packed stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporters.encoding import TensorCensus, census_of_mask, encoding_bytes
from exporters.errors import ExportError
from exporters.fragments import dtype_name, tensor_bytes
from exporters.graph_nodes import used_nodes
from exporters.graph_weights import GraphWeight
from exporters.int8_function import INT8_OPERATOR, int8_function
from exporters.manifest import TensorRow
from exporters.masks import nonzero_mask
from exporters.matrix_uses import MatrixUses, UseFinder
from exporters.packed_function import DOMAIN, DOMAIN_VERSION, MOST_WEIGHTS, fallback_functions
from exporters.packed_nodes import (
    MASK,
    OFFSETS,
    SCALES,
    VALUES,
    Lookup,
    PackedForm,
    PackedProduct,
    Product,
    int8_lookup,
    int8_product,
    packed_experts,
    packed_products,
    shared_constants,
)
from exporters.packing import STRIP_ROWS, TAIL_BYTES, PackedMatrix, pack_matrix, spread_scales, value_elements
from exporters.quantized import QuantizedWeight

__all__ = ["PackedGraph", "pack_graph"]

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_INT4_TYPE, _INT8_TYPE = int(TensorProto.INT4), int(TensorProto.INT8)


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is packed: its census, whether its parameter lies the other way, its scales."""

    census: TensorCensus
    transposed: bool
    pruned: bool
    quantized: QuantizedWeight | None


@dataclass(frozen=True)
class PackedGraph:
    """A graph and its weights, ready to be written with dense initializers.

    Attributes:
        proto: The graph without the weights.
        weights: The initializers to add: parts of packed weights, integers, and all the others.
        packed: The packed weights by name.
        left: Names of pruned or quantised weights that stayed as they were.
    """

    proto: onnx.ModelProto
    weights: list[GraphWeight]
    packed: Mapping[str, PackedWeight]
    left: tuple[str, ...]

    def rows(self, written: Sequence[TensorRow], location: str) -> tuple[TensorRow, ...]:
        """The manifest's rows, one per weight again, from those of the initializers in the data file ``location``."""
        by_name = {row.name: row for row in written}
        rows = []
        for row in written:
            owner, dot, ending = row.name.rpartition(".")
            part = dot + ending
            if owner in self.packed and part in (MASK, VALUES, OFFSETS, SCALES):
                if part == MASK:
                    rows.append(self._packed_row(owner, by_name, location))
            elif part == SCALES and owner in by_name:
                continue
            elif (scales := by_name.get(f"{row.name}{SCALES}")) is not None:
                more = scales.stored_bytes
                sizes = {kind: size + more for kind, size in row.bytes_by_encoding.items()}
                whole = dataclasses.replace(
                    row, bytes_by_encoding=sizes, stored_bytes=row.stored_bytes + more
                )
                rows.append(whole)
            else:
                rows.append(row)
        return tuple(rows)

    def _packed_row(self, name: str, by_name: Mapping[str, TensorRow], location: str) -> TensorRow:
        weight = self.packed[name]
        parts = [by_name.get(f"{name}{part}") for part in (MASK, VALUES, OFFSETS, SCALES)]
        stored = sum(row.stored_bytes for row in parts if row is not None)
        census = weight.census
        return TensorRow(
            name=name,
            shape=census.shape,
            dtype=dtype_name(census.dtype),
            transposed=weight.transposed,
            input_axis=-1,
            pruned=weight.pruned and census.nnz < census.size,
            nnz=census.nnz,
            encoding="packed",
            mask_sha256=census.mask_sha256,
            bytes_by_encoding={**encoding_bytes(census, location), "packed": stored},
            stored_bytes=stored,
        )


def pack_graph(
    proto: onnx.ModelProto,
    weights: Sequence[GraphWeight],
    *,
    pruned: Collection[str],
    quantized: Mapping[str, QuantizedWeight],
    activation_bits: int,
) -> PackedGraph:
    """Pack what is sparse, and store as integers what is quantised.

    A pruned weight is packed where that is smaller than dense. Of the quantised ones int4 is packed in any case, and
    int8 where more than an eighth is zero: else it stays one byte a weight, as heads and embeddings do.

    Args:
        proto: The graph without these weights. Not changed.
        weights: Its weights.
        pruned: Names of those that pruning gave zeros.
        quantized: How weights were quantised, by name; the weights are multiples of their scales.
        activation_bits: 8 rounds what enters a packed or integer product, 32 leaves it.

    Raises:
        ExportError: E-EXPORT-SCALES: a weight is not a multiple of its scales.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    work = _Packing(changed, quantized, activation_bits)
    for weight in weights:
        work.add(weight, is_pruned=weight.name in pruned)
    return work.finish()


class _Packing:
    """The graph as it changes, weight by weight."""

    def __init__(
        self, proto: onnx.ModelProto, quantized: Mapping[str, QuantizedWeight], activation_bits: int
    ) -> None:
        self._proto, self._quantized, self._bits = proto, quantized, activation_bits
        self._finder = UseFinder(proto.graph)
        self._replaced: dict[int, list[onnx.NodeProto]] = {}  # by id of the node that they stand for
        self._weights: list[GraphWeight] = []
        self._packed: dict[str, PackedWeight] = {}
        self._products: dict[int, PackedProduct] = {}  # by id of the node that they stand for
        self._left: list[str] = []
        self._cache = _LastPacked()

    def add(self, weight: GraphWeight, *, is_pruned: bool) -> None:
        """Take the next weight."""
        quantized = self._quantized.get(weight.name)
        if quantized is None and not (is_pruned and weight.dtype in _FLOATS):
            self._weights.append(weight)
            return
        # All packed weights of a model are of one kind, as the attributes of the operators are.
        uses = MatrixUses() if quantized is None and self._quantized else self._finder.of(weight)
        taken = False
        if uses.products or uses.experts:
            taken = self._add_packed(weight, uses, quantized, is_pruned)
        if not taken and quantized is not None and (uses.products or uses.lookups):
            taken = self._add_int8(weight, uses.products, uses.lookups, quantized)
        if taken:
            for node in uses.between:
                self._replaced[id(node)] = []
        else:
            self._weights.append(weight)
            self._left.append(weight.name)

    def finish(self) -> PackedGraph:
        """The graph with all changes."""
        graph = self._proto.graph
        self._place_products()
        nodes = [new for node in graph.node for new in self._replaced.get(id(node), [node])]
        if self._replaced:
            nodes = used_nodes(nodes, graph)
            nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del graph.node[:]
            graph.node.extend(nodes)
            used = {value for node in nodes for value in node.input}
            graph.initializer.extend(constant for constant in shared_constants() if constant.name in used)
        self._add_functions({node.op_type for node in nodes if node.domain == DOMAIN})
        return PackedGraph(self._proto, self._weights, self._packed, tuple(self._left))

    def _add_functions(self, operators: Collection[str]) -> None:
        """What stands for the operators where the library is not there."""
        opset = next(entry.version for entry in self._proto.opset_import if not entry.domain)
        functions = []
        if self._packed:
            kinds = {_kind(weight) for weight in self._packed.values()}
            if len(kinds) != 1:
                raise ValueError(f"packed weights of several kinds in one model: {sorted(kinds)}")
            int4, group_size = next(iter(kinds))
            functions += fallback_functions(
                operators, int4=int4, group_size=group_size, activation_bits=self._bits, opset=opset
            )
        if INT8_OPERATOR in operators:
            functions.append(int8_function(activation_bits=self._bits, opset=opset))
        self._proto.functions.extend(functions)
        if functions and all(entry.domain != DOMAIN for entry in self._proto.opset_import):
            self._proto.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))

    def _place_products(self) -> None:
        """Put operators in the place of packed products.

        Products of the same input become one operator where the first of them stands, which has then all that the
        others need: the operator rounds its input once, and wakes the other threads once.
        """
        groups: list[list[PackedProduct]] = []
        by_input: dict[object, list[PackedProduct]] = {}
        for node in self._proto.graph.node:
            packed = self._products.get(id(node))
            if packed is None:
                continue
            group = by_input.get(packed.shared)
            if group is None or len(group) == MOST_WEIGHTS or self._finder.is_computed(packed.product.bias):
                group = by_input[packed.shared] = []
                groups.append(group)
            group.append(packed)
        for group in groups:
            nodes = packed_products(group, self._bits)
            for packed in group:
                self._replaced[id(packed.product.node)] = nodes
                nodes = []

    def _add_packed(
        self, weight: GraphWeight, uses: MatrixUses, quantized: QuantizedWeight | None, is_pruned: bool
    ) -> bool:
        """Pack the weight if that can be, and is smaller; whether it was."""
        rows_first = uses.products[0].rows_first if uses.products else True
        if not uses.may_be_packed(weight.shape) or any(
            product.rows_first != rows_first for product in uses.products
        ):
            return False

        def numbers() -> NDArray[np.generic]:
            W = _matrix(weight, rows_first)
            return W if quantized is None else _integers(W, quantized, weight.name)

        int4 = quantized is not None and quantized.bits == 4
        kept = nonzero_mask(numbers())
        stored_type = weight.dtype if quantized is None else _INT4_TYPE if int4 else _INT8_TYPE
        full_shape = weight.shape if uses.experts else kept.shape
        census = census_of_mask(weight.name, stored_type, kept.reshape(full_shape))
        elements = value_elements(kept, int4=int4)
        value_type = int(TensorProto.UINT8) if int4 else stored_type
        value_bytes = tensor_bytes((1,), value_type)
        packed_bytes = -(-kept.shape[1] // 8) * len(kept) + elements * value_bytes
        # Integers of experts have no other form than packed.
        dense_bytes = tensor_bytes(kept.shape, stored_type)
        if packed_bytes >= dense_bytes and not int4 and (quantized is None or not uses.experts):
            return False
        self._packed[weight.name] = PackedWeight(
            census, weight.transposed == rows_first, is_pruned, quantized
        )
        self._add_parts(weight, kept.shape, value_type, elements, numbers, int4)
        form = PackedForm(
            weight.name,
            rows=full_shape[-2],
            columns=full_shape[-1],
            group_size=0 if quantized is None else quantized.group_size,
            scaled=quantized is not None,
            float_type=TensorProto.FLOAT16 if weight.dtype == TensorProto.FLOAT16 else TensorProto.FLOAT,
        )
        for product in uses.products:
            self._products[id(product.node)] = PackedProduct(product, form)
        for of_experts in uses.experts:
            gather, product, squeeze = of_experts.nodes
            self._replaced |= {id(gather): [], id(squeeze): []}
            self._replaced[id(product)] = packed_experts(of_experts, form, self._bits)
        return True

    def _add_parts(
        self,
        weight: GraphWeight,
        shape: tuple[int, ...],
        value_type: int,
        elements: int,
        numbers: Callable[[], NDArray[np.generic]],
        int4: bool,
    ) -> None:
        """The initializers of a packed weight, each packed again when it is loaded, one weight at a time."""
        rows, columns = shape
        tail = TAIL_BYTES // tensor_bytes((1,), value_type)
        parts: dict[str, tuple[tuple[int, ...], int, Callable[[PackedMatrix], NDArray[np.generic]]]] = {
            MASK: ((rows, -(-columns // 8)), int(TensorProto.UINT8), lambda packed: packed.mask),
            VALUES: ((elements + tail,), value_type, lambda packed: packed.values),
            OFFSETS: ((-(-rows // STRIP_ROWS) + 1,), int(TensorProto.INT64), lambda packed: packed.offsets),
        }
        for ending, (part_shape, dtype, of) in parts.items():
            load = self._cache.loader(weight.name, lambda: pack_matrix(numbers(), int4=int4), of)
            self._weights.append(_part(weight, ending, part_shape, dtype, load))
        quantized = self._packed[weight.name].quantized
        if quantized is not None:
            self._add_scales(weight, quantized.scales)

    def _add_int8(
        self,
        weight: GraphWeight,
        products: Sequence[Product],
        lookups: Sequence[Lookup],
        quantized: QuantizedWeight,
    ) -> bool:
        """Store the weight as int8 (N, K), which is (V, D) where it is looked up in; whether that can be."""
        orders = {product.rows_first for product in products} | ({True} if lookups else set())
        if quantized.bits != 8 or quantized.group_size or len(weight.shape) != 2 or len(orders) != 1:
            return False
        rows_first = orders == {True}

        def load() -> NDArray[np.generic]:
            return _integers(_matrix(weight, rows_first), quantized, weight.name)

        self._weights.append(
            GraphWeight(
                weight.name,
                weight.parameter,
                weight.shape if rows_first else weight.shape[::-1],
                _INT8_TYPE,
                weight.transposed == rows_first,
                load,
            )
        )
        self._add_scales(weight, quantized.scales.reshape(-1))
        for product in products:
            self._replaced[id(product.node)] = [int8_product(product, weight.name, self._bits)]
        for lookup in lookups:
            self._replaced[id(lookup.node)] = int8_lookup(lookup, weight.name)
        return True

    def _add_scales(self, weight: GraphWeight, scales: NDArray[np.float32]) -> None:
        self._weights.append(
            _part(
                weight, SCALES, scales.shape, int(TensorProto.FLOAT), lambda: np.asarray(scales, np.float32)
            )
        )


class _LastPacked:
    """The packed form of one weight, kept until another is asked for."""

    def __init__(self) -> None:
        self._name = ""
        self._packed: PackedMatrix | None = None

    def loader(
        self,
        name: str,
        pack: Callable[[], PackedMatrix],
        of: Callable[[PackedMatrix], NDArray[np.generic]],
    ) -> Callable[[], NDArray[np.generic]]:
        """What loads one part."""

        def load() -> NDArray[np.generic]:
            if self._packed is None or self._name != name:
                self._packed = None  # before the next one is made
                self._packed, self._name = pack(), name
            return of(self._packed)

        return load


def _kind(weight: PackedWeight) -> tuple[bool, int]:
    quantized = weight.quantized
    return (False, 0) if quantized is None else (quantized.bits == 4, quantized.group_size)


def _matrix(weight: GraphWeight, rows_first: bool) -> NDArray[np.generic]:
    """The weight as (N, K); of experts (E N, K)."""
    W = weight.load()
    if W.ndim == 3:
        return np.ascontiguousarray(W.reshape(-1, W.shape[2]))
    return np.ascontiguousarray(W if rows_first else W.T)


def _integers(W: NDArray[np.generic], quantized: QuantizedWeight, name: str) -> NDArray[np.int8]:
    """The integers that W (N, K) is, times its scales."""
    scales = spread_scales(quantized.scales, W.shape[1], quantized.group_size)
    if scales.shape[0] != W.shape[0] or scales.shape[1] not in (1, W.shape[1]):
        raise _scales_error(name, f"scales of shape {list(quantized.scales.shape)} for {list(W.shape)}")
    steps = np.asarray(W, np.float32) / scales
    q = np.rint(steps)
    largest = 2 ** (quantized.bits - 1) - 1
    if not bool((np.abs(steps - q) <= 1e-3).all()) or bool((np.abs(q) > largest).any()):
        raise _scales_error(name, f"it is no multiple of its scales up to {largest}")
    return np.asarray(q, np.int8)


def _scales_error(name: str, reason: str) -> ExportError:
    return ExportError("E-EXPORT-SCALES", f"{name}: {reason}", "make the model again")


def _part(
    weight: GraphWeight,
    ending: str,
    shape: tuple[int, ...],
    dtype: int,
    load: Callable[[], NDArray[np.generic]],
) -> GraphWeight:
    return GraphWeight(f"{weight.name}{ending}", weight.parameter, shape, dtype, False, load)
