"""Whether a whole ONNX model fits in memory, and so how parity is measured: at once, or block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable

from onnx import TensorProto

from exporters.file_graph import FileGraph, graph_of_file
from exporters.fragments import tensor_bytes
from exporters.stored import StoredTensor
from validators.errors import ValidationUsageError
from validators.request import ValidationRequest
from validators.structure import Structure
from validators.validate import available_memory_bytes

__all__ = ["blocks_of", "loaded_bytes"]

# Peak memory of a process that loads and runs a session, against its expanded weights. Dense float32: 1.15 was
# measured of a file of 2.45 GiB. Sparse weights are in memory with their indices, eight bytes each, while they are
# expanded; weights of 16 bits gain a copy in float32, in which the CPU provider computes.
_DENSE, _SPARSE, _HALF = 1.3, 2.2, 3.0


def loaded_bytes(tensors: Iterable[StoredTensor]) -> int:
    """About what a session of the whole model takes, sparse weights expanded."""
    return int(
        sum(_factor(one) * tensor_bytes(one.shape, one.dtype) for one in tensors if math.prod(one.shape))
    )


def _factor(tensor: StoredTensor) -> float:
    if tensor.dtype in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return _HALF
    return _SPARSE if tensor.encoding == "sparse" else _DENSE


def blocks_of(structure: Structure, request: ValidationRequest) -> tuple[FileGraph | None, str | None]:
    """The graph to run block by block, None to run it whole; and why blocks were chosen, where nobody asked for them.

    Raises:
        ValidationUsageError: E-PARITY-BLOCKS: blocks are asked for, and the file does not show where they are, or has
            packed weights.
    """
    if structure.packed and request.parity == "blocks":
        raise ValidationUsageError(
            "E-PARITY-BLOCKS",
            f"{structure.model_path.name} has packed weights, which run with the whole model only",
            "give --parity whole: packed weights are used as they lie in the file, and take little memory",
        )
    if structure.packed or request.parity == "whole":
        return None, None
    needed, free = loaded_bytes(structure.model.tensors), available_memory_bytes()
    free = min(free, request.memory_limit_bytes or free)
    runs_whole = request.tasks is not None or needed <= free
    if request.parity == "auto" and runs_whole:
        return None, None
    graph = graph_of_file(structure.model, structure.block_outputs)
    if request.parity == "auto":
        sizes = f"about {needed / 2**30:.2f} GiB in ONNX Runtime, {free / 2**30:.2f} GiB are free"
        return graph, None if graph is None else f"parity block by block: the whole model needs {sizes}"
    if graph is None:
        raise ValidationUsageError(
            "E-PARITY-BLOCKS",
            f"{structure.model_path.name} does not show where its blocks are: no manifest names their outputs, or it "
            "is not an export of blockpress",
            "keep the .manifest.json beside the model, or give --parity whole",
        )
    return graph, None
