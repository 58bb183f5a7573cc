"""The weights of a graph under construction: how they are named, stored and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.errors import ExportError
from exporters.parts import ModelParts, canonical_names

__all__ = ["GraphWeight", "WeightTable", "WeightUse", "onnx_dtype", "weight_uses"]

_ONNX_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}


@dataclass(frozen=True)
class GraphWeight:
    """An initializer that is not in the graph's message; it is loaded when it is written.

    Attributes:
        name: Name of the initializer, which is the parameter's name in the state dict.
        parameter: Name of the parameter in the state dict.
        shape: Shape as stored, after the transposition.
        dtype: ONNX element type as stored.
        transposed: Whether the parameter's two axes are swapped, so that the graph multiplies by it directly.
        load: Returns the values as stored.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    dtype: int
    transposed: bool
    load: Callable[[], NDArray[np.generic]]


@dataclass(frozen=True)
class WeightUse:
    """A weight as the graph uses it: its name, the traced input that stands for it, whether transposed."""

    name: str
    traced: ir.Value
    transposed: bool


def weight_uses(weights: Mapping[str, ir.Value]) -> dict[ir.Value, WeightUse]:
    """Return which traced values are weights.

    A matrix that is used only as its transpose, as in a linear layer, is stored transposed, and what its
    Transpose nodes return stands for it. A tied head's matrix is also gathered from and stays as it is.
    """
    uses = {}
    for name, value in weights.items():
        users = [use.node for use in value.uses()]
        if users and all(node.op_type == "Transpose" and _permutation(node) == [1, 0] for node in users):
            uses.update({node.outputs[0]: WeightUse(name, value, True) for node in users})
        else:
            uses[value] = WeightUse(name, value, False)
    return uses


def _permutation(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


class WeightTable:
    """Gives out the value of each weight, once, and collects what has to be stored.

    Parameters and persistent buffers become `GraphWeight`s; buffers that no checkpoint holds become constants
    in the graph. Where a weight is stored in another dtype than the graph computes in, its value is that of a Cast.
    """

    def __init__(self, parts: ModelParts) -> None:
        self.weights: list[GraphWeight] = []
        self.constants: list[ir.Value] = []
        self._parts = parts
        self._first_names = canonical_names(parts.model)
        self._persistent = set(parts.model.state_dict(keep_vars=True))
        self._values: dict[str, ir.Value] = {}

    def value(self, use: WeightUse, scope: str) -> tuple[ir.Value, ir.Node | None]:
        """Return the value of the weight `scope` + `use.name`, and a new Cast if it needs one.

        Another name of a tied weight gives the same value.
        """
        name = self._first_names[scope + use.name]
        if name in self._values:
            return self._values[name], None
        if name not in self._persistent:
            self._values[name] = self._constant(name)
            return self._values[name], None
        stored_type = onnx_dtype(name, self._parts.stored_dtype(name))
        shape = _shape(use.traced)[:: -1 if use.transposed else 1]
        self.weights.append(
            GraphWeight(
                name, name, shape, int(stored_type), use.transposed, self._loader(name, use.transposed)
            )
        )
        initializer = ir.Value(name=name, type=ir.TensorType(stored_type), shape=ir.Shape(shape))
        cast = None if stored_type == use.traced.dtype else _cast(initializer, use.traced.dtype)
        self._values[name] = initializer if cast is None else cast.outputs[0]
        return self._values[name], cast

    def _constant(self, name: str) -> ir.Value:
        tensor = dict(self._parts.model.named_buffers(remove_duplicate=False))[name]
        constant = ir.Value(name=name, const_value=ir.tensor(_numpy(tensor), name=name))
        self.constants.append(constant)
        return constant

    def _loader(self, name: str, transposed: bool) -> Callable[[], NDArray[np.generic]]:
        parts = self._parts

        def load() -> NDArray[np.generic]:
            tensor = parts.stored(name)
            return _numpy(tensor.t() if transposed else tensor)

        return load


def _shape(value: ir.Value) -> tuple[int, ...]:
    sizes = tuple(size for size in value.shape or () if isinstance(size, int))
    if value.shape is None or len(sizes) != len(value.shape):
        raise RuntimeError(f"the exporter gave the weight {value.name} no fixed shape")
    return sizes


def _cast(value: ir.Value, dtype: ir.DataType | None) -> ir.Node:
    if dtype is None:
        raise RuntimeError(f"the exporter gave the weight {value.name} no type")
    output = ir.Value(name=f"{value.name}/{dtype.name.lower()}", type=ir.TensorType(dtype))
    to = ir.AttrInt64("to", int(dtype))
    return ir.Node("", "Cast", [value], [to], outputs=[output], name=f"{value.name}/Cast")


def onnx_dtype(name: str, dtype: torch.dtype) -> ir.DataType:
    """Return the ONNX element type for a PyTorch one; `name` is whose type it is, for the error message.

    Raises:
        ExportError: E-EXPORT-DTYPE when the graph cannot hold it.
    """
    if dtype not in _ONNX_DTYPES:
        raise ExportError(
            "E-EXPORT-DTYPE",
            f"{name} is stored as {str(dtype).removeprefix('torch.')}, which the exported graph cannot hold",
            "Export with --dtype float32, float16 or bfloat16.",
        )
    return _ONNX_DTYPES[dtype]


def _numpy(tensor: Tensor) -> NDArray[np.generic]:
    array = tensor.detach().cpu().contiguous()
    if array.dtype == torch.bfloat16:
        bits: NDArray[np.generic] = array.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    values: NDArray[np.generic] = array.numpy()
    return values
