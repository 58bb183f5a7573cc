"""What a model file holds that decides its speed: in which form its weights are, and how many bytes a token reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from exporters.attention_function import CACHE_ROOM, is_attention
from exporters.fragments import dtype_name, tensor_bytes
from exporters.int8_function import is_int8_product
from exporters.packed_function import (
    WEIGHT_INPUTS,
    first_weight_input,
    is_expert_product,
    is_packed_product,
    weight_inputs,
)
from exporters.packed_read import PackedTensor
from exporters.read import OnnxFile
from exporters.stored import SparseTensor, StoredTensor

_INTEGER_PRODUCTS = {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul"}
_FLOAT_PRODUCTS = {"MatMul", "Gemm"}
_SAME_WEIGHT = {"Cast", "Transpose", "Identity"}  # folded when ONNX Runtime loads the file
_LOOK_UPS = {"Gather", "GatherND", "GatherBlockQuantized"}

Consumers = Mapping[str, list[tuple[onnx.NodeProto, int]]]


@dataclass(frozen=True)
class Contents:
    """A model file, without its weights.

    Attributes:
        path: The ``.onnx`` file.
        form: How most of its weights are stored, which names it: "sparse-int8" (packed), "sparse-initializers",
            "dense-float32", "dense-int4".
        packed_products: Products with packed weights: they need the operator library.
        int8_products: Products with a dense int8 matrix that are one operator of the library.
        products: Products with a stored matrix, in whichever form.
        float_products: Those of them whose operator is that of floating-point numbers.
        file_bytes: Of the file and its external data.
        data_files: The external data.
        bytes_per_step: Bytes of weights that ONNX Runtime reads for one step of decoding, whatever the batch:
            every matrix once, of an embedding a row. Caches are not in it. None for a mixture of experts, where it
            depends on the tokens.
        attentions: Blocks whose attention is one operator of the library.
        cache_room: Whether the library extends a cache with room for more tokens in place.
    """

    path: Path
    form: str
    packed_products: int
    products: int
    float_products: int
    file_bytes: int
    data_files: tuple[Path, ...]
    bytes_per_step: int | None
    int8_products: int = 0
    attentions: int = 0
    cache_room: bool = False

    @property
    def has_own_operators(self) -> bool:
        """Whether the operator library has operators for nodes of the file."""
        return self.packed_products + self.int8_products + self.attentions > 0


def contents_of(model: OnnxFile) -> Contents:
    """What is in ``model``."""
    graph = model.proto.graph
    constants = {part.name: part for tensor in model.tensors for part in _parts(tensor) if part.name}
    consumers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for place, name in enumerate(node.input):
            consumers[name].append((node, place))
    data_files = tuple(sorted({path for tensor in model.tensors for path in tensor.data_files}))
    makers = {name: node for node in graph.node if node.op_type in _SAME_WEIGHT for name in node.output}
    products = [node for node in graph.node if _has_weight(node, constants, makers)]
    return Contents(
        path=model.path,
        form=_form(graph.node, constants),
        packed_products=sum(len(node.output) for node in filter(is_packed_product, graph.node)),
        int8_products=sum(map(is_int8_product, graph.node)),
        products=sum(len(node.output) if is_packed_product(node) else 1 for node in products),
        float_products=sum(node.op_type in _FLOAT_PRODUCTS for node in products),
        file_bytes=sum(path.stat().st_size for path in (model.path, *data_files)),
        data_files=data_files,
        bytes_per_step=_bytes_per_step(constants.values(), consumers),
        attentions=sum(map(is_attention, graph.node)),
        cache_room=model.metadata.get(CACHE_ROOM) == "1",
    )


def _parts(tensor: StoredTensor) -> Sequence[StoredTensor]:
    """What ONNX Runtime has as constants: a packed weight is several."""
    return tensor.parts if isinstance(tensor, PackedTensor) else (tensor,)


def _form(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, StoredTensor]) -> str:
    """The form that most bytes of weights have, as a name."""
    stored: Counter[str] = Counter()
    told: set[str] = set()
    for node in nodes:
        for place, form in _told_by(node, constants):
            if node.input[place] in constants:
                told.add(node.input[place])
                stored[form] += constants[node.input[place]].stored_bytes
    for name, tensor in constants.items():
        if name not in told and sum(side > 1 for side in tensor.shape) >= 2:
            sparse = isinstance(tensor, SparseTensor)
            stored["sparse-initializers" if sparse else f"dense-{dtype_name(tensor.dtype)}"] += (
                tensor.stored_bytes
            )
    # What was done on purpose names a model, though its largest tensor may be an embedding that was left alone.
    for mark in ("sparse-int", "sparse-float", "sparse-bfloat", "sparse-", "dense-int", "dense-"):
        ranked = [(size, form) for form, size in stored.items() if form.startswith(mark)]
        if ranked:
            return max(ranked)[1]
    return "dense"


def _told_by(node: onnx.NodeProto, constants: Mapping[str, StoredTensor]) -> list[tuple[int, str]]:
    """Inputs of a node whose operator says what form they have."""
    if is_packed_product(node):
        return [
            told
            for number in range(len(weight_inputs(node)))
            for told in _told_by_packed(node, number, constants)
        ]
    if node.op_type == "MatMulNBits":
        bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 4)
        return [(1, f"dense-int{bits}")]
    if is_int8_product(node):
        return [(1, "dense-int8")]
    if node.op_type in _INTEGER_PRODUCTS:
        return [(place, "dense-int8") for place in range(1, len(node.input)) if place in (1, 3)]
    return []


def _told_by_packed(
    node: onnx.NodeProto, number: int, constants: Mapping[str, StoredTensor]
) -> list[tuple[int, str]]:
    """The places of mask and values of one of the node's weights, and their form."""
    mask = first_weight_input(node) + number * len(WEIGHT_INPUTS)
    if len(node.input) <= mask + 1:
        return []
    values = constants.get(node.input[mask + 1])
    kind = "int4" if values is None or values.dtype == TensorProto.UINT8 else dtype_name(values.dtype)
    return [(mask, f"sparse-{kind}"), (mask + 1, f"sparse-{kind}")]


def _has_weight(
    node: onnx.NodeProto, constants: Mapping[str, StoredTensor], makers: Mapping[str, onnx.NodeProto]
) -> bool:
    """Whether the node multiplies by a constant matrix, which may be cast or transposed first."""
    if is_packed_product(node) or is_int8_product(node) or node.op_type == "MatMulNBits":
        return True
    if node.op_type not in _FLOAT_PRODUCTS | _INTEGER_PRODUCTS:
        return False
    for name in node.input[1:]:
        passed: set[str] = set()
        while name in makers and name not in passed:  # a broken graph may have cycles
            passed.add(name)
            name = makers[name].input[0]
        if name in constants and len(constants[name].shape) >= 2:
            return True
    return False


def _bytes_per_step(tensors: Iterable[StoredTensor], consumers: Consumers) -> int | None:
    total = 0
    for tensor in tensors:
        dtype, uses = _uses(tensor, consumers)
        if any(is_expert_product(node) for node, _ in uses):
            return None
        if uses and all(node.op_type in _LOOK_UPS and place == 0 for node, place in uses):
            if len(tensor.shape) > 2:
                return None  # which experts are looked up depends on the token
            axis = next((a.i for node, _ in uses for a in node.attribute if a.name == "axis"), 0)
            axis %= max(1, len(tensor.shape))
            total += tensor_bytes((*tensor.shape[:axis], *tensor.shape[axis + 1 :]), dtype)
        elif uses:
            total += tensor_bytes(tensor.shape, dtype)
    return total


def _uses(tensor: StoredTensor, consumers: Consumers) -> tuple[int, list[tuple[onnx.NodeProto, int]]]:
    """The type in which the constant is read at run time, and the nodes that read it.

    Casts and transposes of a constant are made once, at load; what runs is their result.
    """
    dtype, uses, pending = tensor.dtype, [], [tensor.name]
    seen = set(pending)
    while pending:
        for node, place in consumers.get(pending.pop(), []):
            if node.op_type not in _SAME_WEIGHT or place != 0 or not node.output:
                uses.append((node, place))
                continue
            if node.op_type == "Cast":
                dtype = next((a.i for a in node.attribute if a.name == "to"), dtype)
            if node.output[0] not in seen:  # a broken graph may have cycles
                seen.add(node.output[0])
                pending.append(node.output[0])
    return dtype, uses
