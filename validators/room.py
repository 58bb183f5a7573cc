"""Whether a whole ONNX model fits in memory, and so how parity is measured: at once, or block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable

from exporters.file_graph import FileGraph, graph_of_file
from exporters.fragments import tensor_bytes
from exporters.stored import StoredTensor
from validators.errors import ValidationUsageError
from validators.request import ValidationRequest
from validators.structure import Structure
from validators.validate import available_memory_bytes

__all__ = ["blocks_of", "loaded_bytes"]

# Resident memory of a loaded session against its expanded weights: kernels keep copies in an order of their own, and
# the first ones are let go only when all are made.
_LOADED = 2.2


def loaded_bytes(tensors: Iterable[StoredTensor]) -> int:
    """About what a session of the whole model takes, sparse weights expanded."""
    return int(_LOADED * sum(tensor_bytes(one.shape, one.dtype) for one in tensors if math.prod(one.shape)))


def blocks_of(structure: Structure, request: ValidationRequest) -> tuple[FileGraph | None, str | None]:
    """The graph to run block by block, None to run it whole; and why blocks were chosen, where nobody asked for them.

    Raises:
        ValidationUsageError: E-PARITY-BLOCKS: blocks are asked for, and the file does not show where they are.
    """
    if request.parity == "whole":
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
