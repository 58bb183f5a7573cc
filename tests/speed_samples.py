"""Measurements with made-up figures, and small files in the forms that are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from exporters.packed_function import DOMAIN, DOMAIN_VERSION, OPERATOR
from exporters.packing import pack_matrix
from validators.speed.contents import Contents
from validators.speed.results import ModelSpeed, Rounds, Speed
from validators.speed.workload import Workload

MIB = 2**20


def model_speed(name: str, step_s: tuple[float, ...], prefill_s: tuple[float, ...], mib: int) -> ModelSpeed:
    """A model of `mib` MiB, all of which a step reads, measured at batch 2."""
    contents = Contents(
        path=Path(f"{name}.onnx"),
        form=name,
        packed_products=int(name.startswith("sparse")),
        products=3,
        float_products=0,
        file_bytes=mib * MIB,
        data_files=(),
        bytes_per_step=mib * MIB,
    )
    rounds = (Rounds(2, prefill_s, step_s),)
    return ModelSpeed(name, contents, None, (0.5, 0.7, 0.6), mib * MIB, MIB, 2 * mib * MIB, rounds)


def measured() -> Speed:
    """A sparse model that is twice as fast as its rival in every round, though the second round was slow for both."""
    models = (
        model_speed("sparse-int8", (0.010, 0.040, 0.012), (0.5, 0.5, 1.0), 64),
        model_speed("dense-int8", (0.020, 0.080, 0.024), (0.25, 0.5, 0.5), 128),
    )
    workload = Workload(prompt_tokens=100, decode_tokens=8, batches=(2,), rounds=3)
    bandwidth = (10 * 2.0**30, 11 * 2.0**30, 9 * 2.0**30)
    return Speed(models, ("dense-int8",), workload, bandwidth, ("<the machine was busy>",))


def packed_product(path: Path, W: NDArray[np.float32], bias: NDArray[np.float32]) -> Path:
    """A file that computes ``y = x Wᵀ + bias`` by one packed weight. ``W``: (outputs, inputs)."""
    packed = pack_matrix(W)
    parts = {
        "mask": packed.mask,
        "values": packed.values,
        "offsets": packed.offsets,
        "scales": np.ones((1, 1), np.float32),
        "bias": bias,
    }
    options = {"format_version": 1, "columns": W.shape[1], "group_size": 0, "activation_bits": 32}
    node = helper.make_node(OPERATOR, ["x", *parts], ["y"], name="product", domain=DOMAIN, **options)
    graph = helper.make_graph(
        [node],
        "packed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", W.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", W.shape[0]])],
        [numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path
