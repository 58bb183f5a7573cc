"""Models of one product with a dense int8 matrix, and the same product in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from runtime_samples import Floats, rounded_rows, tensor_of

from exporters.int8_function import INT8_OPERATOR, int8_function

ELEMENT_TYPES = {"weight": TensorProto.INT8, "scales": TensorProto.FLOAT, "bias": TensorProto.FLOAT}


def parts_of(rows: int, columns: int) -> dict[str, Any]:
    """A random matrix, its scales and a bias."""
    random = np.random.default_rng([rows, columns])
    return {
        "weight": random.integers(-127, 128, (rows, columns)).astype(np.int8),
        "scales": random.uniform(0.01, 0.1, rows).astype(np.float32),
        "bias": random.standard_normal(rows).astype(np.float32),
    }


def model_of(
    parts: dict[str, Any],
    activation_bits: int,
    *,
    leading: int = 1,
    fed: tuple[str, ...] = (),
    types: dict[str, int] | None = None,
) -> onnx.ModelProto:
    """y = Int8MatMul(x, ...) with its function; the parts named by ``fed`` are inputs of the graph."""
    types = {**ELEMENT_TYPES, **(types or {})}
    tensors = {name: tensor_of(name, array, types[name]) for name, array in parts.items()}
    node = helper.make_node(
        INT8_OPERATOR, ["x", *tensors], ["y"], domain="blockpress", activation_bits=activation_bits
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * leading + [None])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * leading + [None])
    inputs = [x] + [helper.make_tensor_value_info(n, types[n], list(parts[n].shape)) for n in fed]
    held = [tensor for name, tensor in tensors.items() if name not in fed]
    graph = helper.make_graph([node], "product", inputs, [y], held)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("blockpress", 1)]
    functions = [int8_function(activation_bits=activation_bits, opset=18)]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)


def exact_int8_product(
    x: Floats, parts: dict[str, Any], activation_bits: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y, of x rounded where it is, and the sum of the sizes of the terms of each y."""
    rows = x.reshape(-1, x.shape[-1])
    used = rows.astype(np.float64)
    if activation_bits == 8:
        integers, step = rounded_rows(rows)
        used = integers * step.astype(np.float64)
    W = parts["weight"].astype(np.float64) * parts["scales"].astype(np.float64)[:, None]
    shape = (*x.shape[:-1], len(W))
    exact = used @ W.T + parts["bias"]
    terms = np.abs(used) @ np.abs(W).T + np.abs(parts["bias"])
    return exact.reshape(shape), terms.reshape(shape)
