"""Measurements with made-up figures, and small files in the forms that are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_samples import pruned_matrix

from exporters.int8_function import int8_function
from exporters.packed_function import DOMAIN, DOMAIN_VERSION, OPERATOR, fallback_function
from exporters.packed_nodes import (
    Lookup,
    PackedForm,
    PackedProduct,
    Product,
    int8_lookup,
    int8_product,
    packed_products,
    shared_constants,
)
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


VOCABULARY, WIDTH = 128, 64


def language_model(path: Path, *, activation_bits: int | None = None, cache: bool = True) -> Path:
    """A file with the inputs and outputs of a causal language model, and three matrices.

    Args:
        path: Where to write it.
        activation_bits: None: all in float32. 8 or 32: one matrix packed as int8, and head and embedding one int8
            matrix, with activations rounded or not.
        cache: Whether it has a cache.
    """
    inner, table = language_model_weights()
    ids, rows, keys, states = "input_ids", "rows", "keys", "states"
    if activation_bits is None:
        tensors = {"inner": inner * np.float32(0.5), "table": table * np.float32(0.25)}
        look_up = [helper.make_node("Gather", ["table", ids], [rows])]
        product = [helper.make_node("MatMul", [rows, "inner"], [keys])]
        head = [
            helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]),
            helper.make_node("MatMul", [states, "head"], ["logits"]),
        ]
    else:
        packed = pack_matrix(inner.T.astype(np.int8))
        tensors = {
            "inner.mask": packed.mask,
            "inner.values": packed.values,
            "inner.offsets": packed.offsets,
            "inner.scales": np.full((WIDTH, 1), 0.5, np.float32),
            "table": table.astype(np.int8),
            "table.scales": np.full(VOCABULARY, 0.25, np.float32),
        }
        look_up = int8_lookup(Lookup(onnx.NodeProto(), ids, rows, "embed"), "table")
        inner = Product(onnx.NodeProto(), rows, keys, None, True, "inner")
        form = PackedForm("inner", WIDTH, WIDTH, 0, True, int(TensorProto.FLOAT))
        product = packed_products([PackedProduct(inner, form)], activation_bits)
        whole = Product(onnx.NodeProto(), states, "logits", None, True, "head")
        head = [int8_product(whole, "table", activation_bits)]
    axes = {"one": np.array([1]), "two": np.array([2])}
    nodes = [*look_up, *product, helper.make_node("Unsqueeze", [keys, "one"], ["fresh"])]
    for part in ("key", "value"):
        source = [f"past_key_values.0.{part}", "fresh"] if cache else ["fresh", "fresh"]
        nodes.append(helper.make_node("Concat", source, [f"present.0.{part}"], axis=2))
    nodes += [
        helper.make_node("ReduceMean", ["present.0.value", "two"], ["mean"], keepdims=0),
        helper.make_node("Add", [rows, "mean"], [states]),
        *head,
    ]
    ports = [helper.make_tensor_value_info(ids, TensorProto.INT64, ["batch", "tokens"])]
    results = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", VOCABULARY])]
    for part in ("key", "value") if cache else ():
        for found, name in ((ports, "past_key_values"), (results, "present")):
            shape = ["batch", 1, name, WIDTH]
            found.append(helper.make_tensor_value_info(f"{name}.0.{part}", TensorProto.FLOAT, shape))
    constants = [numpy_helper.from_array(array, name) for name, array in {**tensors, **axes}.items()]
    graph = helper.make_graph(nodes, "language model", ports, results, [*constants, *shared_constants()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if activation_bits is not None:
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
        function = fallback_function(int4=False, group_size=0, activation_bits=activation_bits, opset=18)
        model.functions.extend([function, int8_function(activation_bits=activation_bits, opset=18)])
    onnx.save(model, path)
    return path


def language_model_weights() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The whole numbers behind the matrices: inner (in, out) and the table (tokens, width)."""
    inner = pruned_matrix((WIDTH, WIDTH), 0.6, seed=1).astype(np.float32)
    return inner, pruned_matrix((VOCABULARY, WIDTH), 0.0, seed=2).astype(np.float32)
