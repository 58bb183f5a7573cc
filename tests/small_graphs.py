"""Graphs of a few nodes, for the tests of what exports simplify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray


def op_types(graph: ir.Graph) -> list[str]:
    """The types of the nodes, in their order."""
    return [node.op_type for node in graph]


def results(model: ir.Model, feeds: Mapping[str, NDArray[Any]], optimise: bool = True) -> list[NDArray[Any]]:
    """What ONNX Runtime computes, once the checker has passed the model."""
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(result) for result in session.run(None, feeds)]
