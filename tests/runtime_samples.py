"""Models of one operator of the library, packed matrices for them, and the same product in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from blockpress_runtime import BlockpressRuntimeError, library_path, register
from blockpress_runtime.packing import PackedMatrix, ValueType, dequantize, pack

Array = NDArray[Any]
Floats = NDArray[np.float32]

DTYPES: tuple[ValueType, ...] = ("float32", "float16", "bfloat16", "int8", "int4")
NAMES = ("mask", "values", "offsets", "scales", "bias")
_ELEMENT_TYPES = {
    "mask": TensorProto.UINT8,
    "offsets": TensorProto.INT64,
    "scales": TensorProto.FLOAT,
    "bias": TensorProto.FLOAT,
}
_VALUE_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "int4": TensorProto.UINT8,
}


def why_no_library() -> str:
    """Why the operator library cannot be tested; empty where it can."""
    try:
        library_path()
    except BlockpressRuntimeError as error:
        return str(error)
    return ""


needs_library = pytest.mark.skipif(bool(why_no_library()), reason=why_no_library() or "it is there")


def random_packed(
    rows: int, columns: int, dtype: ValueType, *, density: float = 0.5, group_size: int = 0, seed: int = 0
) -> PackedMatrix:
    """A packed matrix with that share of non-zero weights; one row is empty and one is full where there are five."""
    random = np.random.default_rng([rows, columns, seed])
    kept = random.random((rows, columns)) < density
    if rows > 4:
        kept[1], kept[3] = False, True
    if dtype in ("int8", "int4"):
        largest = 127 if dtype == "int8" else 7
        weights = random.integers(1, largest + 1, kept.shape) * random.choice([-1, 1], kept.shape) * kept
        groups = -(-columns // group_size) if group_size else 1
        scales = random.uniform(0.01, 0.1, (rows, groups)).astype(np.float32)
        return pack(weights, dtype, scales, group_size)
    floats = (random.standard_normal(kept.shape).astype(np.float32) * kept).astype(np.float32)
    if dtype == "float16":
        floats = floats.astype(np.float16)
    if dtype == "bfloat16":
        floats = (floats.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return pack(floats, dtype)


def tensors_of(packed: PackedMatrix, bias: Floats | None = None) -> dict[str, onnx.TensorProto]:
    """The inputs 1 to 5 of the operator."""
    no_bias = np.zeros(1, np.float32)
    arrays = {
        "mask": packed.mask,
        "values": packed.values,
        "offsets": packed.offsets,
        "scales": packed.scales,
        "bias": no_bias if bias is None else bias,
    }
    types = {**_ELEMENT_TYPES, "values": _VALUE_TYPES[packed.dtype]}
    return {name: tensor_of(name, array, types[name]) for name, array in arrays.items()}


def tensor_of(name: str, array: Array, element_type: int) -> onnx.TensorProto:
    """An initializer with the array's bytes."""
    tensor = TensorProto(name=name, data_type=element_type, dims=array.shape)
    tensor.raw_data = np.ascontiguousarray(array).tobytes()
    return tensor


def attributes_of(packed: PackedMatrix, activation_bits: int = 32) -> dict[str, int]:
    """The operator's attributes."""
    return {
        "format_version": 1,
        "columns": packed.columns,
        "group_size": packed.group_size,
        "activation_bits": activation_bits,
    }


def model_of(
    tensors: dict[str, onnx.TensorProto],
    attributes: dict[str, int],
    *,
    fed: tuple[str, ...] = (),
    rank: int = 2,
) -> onnx.ModelProto:
    """y = SparseMatMul(x, ...); the tensors named by ``fed`` are graph inputs instead of initializers."""
    node = helper.make_node("SparseMatMul", ["x", *NAMES], ["y"], domain="blockpress", **attributes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)]
    inputs += [
        helper.make_tensor_value_info(name, tensors[name].data_type, list(tensors[name].dims)) for name in fed
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)]
    held = [tensor for name, tensor in tensors.items() if name not in fed]
    graph = helper.make_graph([node], "product", inputs, outputs, held)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("blockpress", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def model_of_several(
    weights: Sequence[dict[str, onnx.TensorProto]], attributes: dict[str, int], *, fed: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """y1, y2 ... = SparseMatMulN(x, ...); names of tensors, those in ``fed`` too, end with the weight's number."""
    tensors = []
    for number, of_weight in enumerate(weights, 1):
        for name in NAMES:
            tensor = TensorProto()
            tensor.CopyFrom(of_weight[name])
            tensor.name = f"{name}{number}"
            tensors.append(tensor)
    ports = [f"y{number}" for number in range(1, len(weights) + 1)]
    node = helper.make_node(
        f"SparseMatMul{len(weights)}",
        ["x", *(t.name for t in tensors)],
        ports,
        domain="blockpress",
        **attributes,
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])]
    inputs += [
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors if t.name in fed
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ports]
    graph = helper.make_graph([node], "products", inputs, outputs, [t for t in tensors if t.name not in fed])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("blockpress", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def model_of_experts(
    tensors: dict[str, onnx.TensorProto],
    attributes: dict[str, int],
    expert_rows: int,
    *,
    fed: tuple[str, ...] = (),
    rank: int = 2,
) -> onnx.ModelProto:
    """y = SparseExpertMatMul(x, experts, ...), where x and experts are fed; the rest as in ``model_of``."""
    model = model_of(tensors, {**attributes, "expert_rows": expert_rows}, fed=fed, rank=rank)
    model.graph.node[0].op_type = "SparseExpertMatMul"
    model.graph.node[0].input.insert(1, "experts")
    model.graph.input.append(helper.make_tensor_value_info("experts", TensorProto.INT64, None))
    return model


def open_session(model: onnx.ModelProto | Path, threads: int = 1) -> Any:
    """A session with the operator library."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    register(options)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def multiply(
    x: Floats, packed: PackedMatrix, bias: Floats | None = None, activation_bits: int = 32, threads: int = 1
) -> Floats:
    """y, by the operator."""
    model = model_of(tensors_of(packed, bias), attributes_of(packed, activation_bits), rank=x.ndim)
    result: Floats = open_session(model, threads).run(None, {"x": x})[0]
    return result


def exact_product(x: Floats, packed: PackedMatrix, bias: Floats | None = None) -> tuple[Array, Array]:
    """y in float64, and the sum of the sizes of its terms, to which rounding errors are in proportion."""
    stored = dequantize(replace(packed, scales=np.ones_like(packed.scales))).astype(np.float64)
    groups = packed.scales.shape[1]
    width = packed.group_size if groups > 1 else packed.columns
    scales = np.repeat(packed.scales.astype(np.float64), width, axis=1)[:, : packed.columns]
    weights = stored * scales
    shift = np.zeros(1) if bias is None else bias.astype(np.float64)
    terms = np.abs(x).astype(np.float64) @ np.abs(weights).T + np.abs(shift)
    return x.astype(np.float64) @ weights.T + shift, terms


def rounded_rows(x: Floats) -> tuple[Array, Array]:
    """x as FORMAT.md rounds it for ``activation_bits`` = 8: integers, and the step of each row."""
    step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    step = np.where(step == 0, np.float32(1), step)
    return np.rint(x / step), step
