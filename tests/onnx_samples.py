"""Small ONNX models with zeros in their weights, for the tests of the files that exporters write and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper

from exporters.encoding import EncodingMode
from exporters.manifest import TensorRow
from exporters.wire import write_model


@dataclass(frozen=True)
class Weight:
    """A weight as the exporter gives it to the writer."""

    name: str
    shape: tuple[int, ...]
    dtype: int
    transposed: bool
    load: Callable[[], NDArray[np.generic]]


def weight_of(name: str, values: NDArray[np.generic]) -> Weight:
    """``values`` as a weight named ``name``."""
    dtype = helper.np_dtype_to_tensor_dtype(values.dtype)
    return Weight(name, values.shape, dtype, True, lambda: values)


def pruned_matrix(
    shape: tuple[int, ...], sparsity: float, seed: int = 0, dtype: DTypeLike = np.float32
) -> NDArray[np.generic]:
    """Small whole numbers, none zero, of which floor(size * sparsity) at random places are then set to zero.

    Whole numbers, so that sums of products are exact and outputs can be compared bit for bit.
    """
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 4, shape) * rng.choice([-1, 1], shape)
    values.reshape(-1)[rng.permutation(values.size)[: int(values.size * sparsity)]] = 0
    return values.astype(dtype)


def product_model(weights: Sequence[Weight], *, opset: int = 18) -> onnx.ModelProto:
    """A graph ``y = x W0 W1 …`` in float32 without its weights; other types are cast first."""
    nodes, value = [], "x"
    for index, weight in enumerate(weights):
        matrix = weight.name
        if weight.dtype != TensorProto.FLOAT:
            matrix = f"{weight.name}.float"
            nodes.append(helper.make_node("Cast", [weight.name], [matrix], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("MatMul", [value, matrix], [f"y{index}"]))
        value = f"y{index}"
    leading = list(weights[-1].shape[:-2])
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weights[0].shape[-2]])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [*leading, "rows", weights[-1].shape[-1]])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def write_product(
    folder: Path, weights: Sequence[Weight], encoding: EncodingMode = "auto", name: str = "model"
) -> tuple[Path, tuple[TensorRow, ...]]:
    """The product of ``weights`` written to ``folder``: the model's path and its rows."""
    path = folder / f"{name}.onnx"
    return path, write_model(product_model(weights), weights, path, f"{name}.onnx.data", encoding=encoding)


def run_product(path: Path, columns: int) -> NDArray[np.float32]:
    """What ONNX Runtime computes from two rows of small whole numbers."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = np.arange(2 * columns, dtype=np.float32).reshape(2, columns) % 5 - 2
    return np.asarray(session.run(None, {"x": rows})[0], np.float32)
