"""Random sparse matrices in every packed type, and models of one product with them, for the tests of the format."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from exporters.packed_function import DOMAIN, WEIGHT_INPUTS, fallback_functions, operator_name
from exporters.packing import FORMAT_VERSION, PackedMatrix, dequantize, groups_of, pack_matrix

RUNTIME = Path(__file__).resolve().parent.parent / "runtime" / "blockpress_runtime"
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LARGEST = {"int8": 127, "int4": 7}


def runtime_packing() -> ModuleType:
    """The runtime's own packing, which is numpy alone, whether its library was built or not."""
    name = "blockpress_runtime_packing"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, RUNTIME / "packing.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass(frozen=True)
class Sample:
    """A sparse matrix W (N, K), as stored, packed, and in float64; its scales; a bias."""

    kind: str
    group_size: int
    stored: NDArray[np.generic]
    packed: PackedMatrix
    scales: NDArray[np.float32]
    bias: NDArray[np.float32]

    @property
    def weights(self) -> NDArray[np.float64]:
        """W in float64."""
        return dequantize(np.asarray(self.stored, np.float32), self.scales, self.group_size).astype(
            np.float64
        )

    def tensors(self) -> dict[str, onnx.TensorProto]:
        """The operator's constants by name."""
        arrays = (self.packed.mask, self.packed.values, self.packed.offsets, self.scales, self.bias)
        return {
            name: numpy_helper.from_array(array, name)
            for name, array in zip(WEIGHT_INPUTS, arrays, strict=True)
        }


def sample(
    rows: int, columns: int, kind: str, group_size: int = 0, *, sparsity: float = 0.5, seed: int = 0
) -> Sample:
    """A random matrix, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    kept = rng.random((rows, columns)) >= sparsity
    bias = rng.normal(size=rows).astype(np.float32)
    if kind in FLOATS:
        stored = (rng.normal(size=kept.shape) * kept).astype(FLOATS[kind])
        return Sample(kind, 0, stored, pack_matrix(stored), np.ones((1, 1), np.float32), bias)
    largest = LARGEST[kind]
    stored = (rng.integers(-largest, largest + 1, kept.shape) * kept).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (rows, groups_of(columns, group_size))).astype(np.float32) / largest
    return Sample(kind, group_size, stored, pack_matrix(stored, int4=kind == "int4"), scales, bias)


def product_model(made: Sample, activation_bits: int, opset: int = 18, leading: int = 2) -> onnx.ModelProto:
    """A model of one packed product, with its fallback."""
    return products_model([made], activation_bits, opset, leading)


def products_model(
    weights: Sequence[Sample], activation_bits: int, opset: int = 18, leading: int = 2
) -> onnx.ModelProto:
    """A model of one operator with these weights, and its fallback; the outputs are y1, y2 and so on."""
    first = weights[0]
    tensors = []
    for number, made in enumerate(weights, 1):
        for tensor in made.tensors().values():
            tensor.name += str(number)
            tensors.append(tensor)
    rows, columns = [len(made.stored) for made in weights], first.stored.shape[1]
    outputs = [f"y{number}" for number in range(1, len(weights) + 1)]
    node = helper.make_node(
        operator_name(len(weights)),
        ["x", *(tensor.name for tensor in tensors)],
        outputs,
        domain=DOMAIN,
        format_version=FORMAT_VERSION,
        columns=columns,
        group_size=first.group_size,
        activation_bits=activation_bits,
    )
    axes: list[int | None] = [None] * leading
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [*axes, width])
        for name, width in zip(["x", *outputs], [columns, *rows], strict=True)
    ]
    graph = helper.make_graph([node], "product", ports[:1], ports[1:], tensors)
    functions = fallback_functions(
        [node.op_type],
        int4=first.kind == "int4",
        group_size=first.group_size,
        activation_bits=activation_bits,
        opset=opset,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def expected(made: Sample, x: NDArray[np.float32], activation_bits: int) -> NDArray[np.float64]:
    """What the product gives, in float64."""
    inputs = x.astype(np.float64)
    if activation_bits == 8:
        step = (np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float32)
        step[step == 0] = 1
        inputs = np.rint(x / step).astype(np.float64) * step
    return inputs @ made.weights.T + made.bias
