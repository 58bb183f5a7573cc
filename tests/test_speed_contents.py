"""What form a file's weights have, what a step reads of them, and the dense form of any of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_samples import pruned_matrix, run_product, weight_of, write_product
from packed_samples import expected, products_model, sample
from speed_samples import language_model, packed_product

from exporters.densify import densify, has_transposed_weights
from exporters.read import read_model
from validators.speed.contents import contents_of


def tied_model(path: Path) -> Path:
    """A file in float16: rows of a table are looked up, cast, and multiplied by the table transposed."""
    table = pruned_matrix((48, 32), 0.5, dtype=np.float16)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["table"], ["same"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["same"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "head"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 48])],
        [numpy_helper.from_array(table, "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_dense_form_computes_the_same(tmp_path: Path) -> None:
    """Sparse initializers become dense ones, bfloat16 becomes float32, and the sums of whole numbers stay exact."""
    weights = [
        weight_of("first", pruned_matrix((64, 48), 0.75)),
        weight_of("second", pruned_matrix((48, 32), 0.6, dtype="bfloat16")),
    ]
    path, rows = write_product(tmp_path, weights, "sparse")
    dense = tmp_path / "dense.onnx"
    densify(read_model(path), dense)
    assert [row.encoding for row in rows] == ["sparse", "sparse"]
    found = read_model(dense)
    assert {tensor.encoding for tensor in found.tensors} == {"dense"}
    assert [node.op_type for node in found.proto.graph.node] == ["MatMul", "MatMul"]  # the cast has gone
    assert np.array_equal(run_product(path, 64), run_product(dense, 64))


def test_dense_form_unties_a_head_when_asked(tmp_path: Path) -> None:
    """A product by a transposed table gets a weight of its own; the table stays for the rows that are looked up."""
    import onnxruntime

    model = read_model(tied_model(tmp_path / "tied.onnx"))
    assert has_transposed_weights(model)
    densify(model, tmp_path / "dense.onnx")
    densify(model, tmp_path / "untied.onnx", fold_transposes=True)
    assert not has_transposed_weights(read_model(tmp_path / "untied.onnx"))
    results = []
    for name in ("tied", "dense", "untied"):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"ids": np.arange(5)})[0])
    assert results[1].dtype == np.float32
    assert all(np.array_equal(results[0].astype(np.float32), result) for result in results[1:])


def test_dense_form_unpacks_packed_weights(tmp_path: Path) -> None:
    """A packed product becomes a plain one and an addition, and is what numpy computes."""
    import onnxruntime

    W, bias = pruned_matrix((20, 70), 0.6).astype(np.float32), np.arange(20, dtype=np.float32)
    path = packed_product(tmp_path / "packed.onnx", W, bias)
    dense = tmp_path / "dense.onnx"
    densify(read_model(path), dense)
    x = np.arange(140, dtype=np.float32).reshape(2, 70) % 5
    session = onnxruntime.InferenceSession(dense, providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": x})[0], x @ W.T + bias)
    assert [entry.domain for entry in read_model(dense).proto.opset_import] == [""]


def test_dense_form_and_contents_of_an_operator_of_several_weights(tmp_path: Path) -> None:
    """Each weight is a product of its own again, with its own output; all of them are counted and read."""
    import onnxruntime

    weights = [sample(rows, 70, "int8", seed=rows) for rows in (20, 5, 33)]
    onnx.save(products_model(weights, 8, leading=1), tmp_path / "packed.onnx")
    found = contents_of(read_model(tmp_path / "packed.onnx"))
    assert (found.form, found.packed_products, found.products, found.float_products) == (
        "sparse-int8",
        3,
        3,
        0,
    )
    assert found.bytes_per_step == sum(
        len(tensor.raw_data) for made in weights for tensor in made.tensors().values()
    )
    densify(read_model(tmp_path / "packed.onnx"), tmp_path / "dense.onnx")
    dense = read_model(tmp_path / "dense.onnx")
    assert contents_of(dense).products == 3
    assert not dense.proto.functions
    x = np.random.default_rng(0).normal(size=(4, 70)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "dense.onnx", providers=["CPUExecutionProvider"])
    for y, made in zip(session.run(None, {"x": x}), weights, strict=True):
        np.testing.assert_allclose(y, expected(made, x, 32), atol=1e-4)


@pytest.mark.parametrize("activation_bits", [8, 32])
def test_dense_form_of_a_quantised_model_is_the_float_model(tmp_path: Path, activation_bits: int) -> None:
    """Packed and integer products and look-ups become plain ones; head and embeddings share one table again."""
    floats = language_model(tmp_path / "floats.onnx")
    quantised = language_model(tmp_path / "quantised.onnx", activation_bits=activation_bits)
    densify(read_model(quantised), tmp_path / "dense.onnx")
    found = read_model(tmp_path / "dense.onnx")
    expected = read_model(floats)
    assert sorted(node.op_type for node in found.proto.graph.node) == sorted(
        node.op_type for node in expected.proto.graph.node
    )
    assert contents_of(found).form == "dense-float32"
    assert contents_of(found).bytes_per_step == pytest.approx(contents_of(expected).bytes_per_step, rel=0.01)
    assert not found.proto.functions
    assert np.array_equal(logits_of(tmp_path / "dense.onnx"), logits_of(floats))


def logits_of(path: Path) -> NDArray[np.float32]:
    """What a language model of `speed_samples` says to a few tokens, with an empty cache."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {port.name: np.zeros((2, 1, 0, 64), np.float32) for port in session.get_inputs()[1:]}
    return np.asarray(session.run(["logits"], {"input_ids": np.arange(6).reshape(2, 3), **feeds})[0])


def test_contents_of_sparse_initializers_are_those_that_run(tmp_path: Path) -> None:
    """They are named as they are stored, but a step reads what ONNX Runtime has made of them: dense float32."""
    weights = [
        weight_of("first", pruned_matrix((64, 48), 0.75)),
        weight_of("second", pruned_matrix((48, 32), 0.9, dtype="bfloat16")),
    ]
    found = contents_of(read_model(write_product(tmp_path, weights, "sparse")[0]))
    assert found.form == "sparse-initializers"
    assert (found.products, found.float_products, found.packed_products) == (2, 2, 0)
    assert found.bytes_per_step == 4 * (64 * 48 + 48 * 32)
    files = [tmp_path / "model.onnx", tmp_path / "model.onnx.data"]
    assert found.file_bytes == sum(path.stat().st_size for path in files)
    assert found.data_files == (files[1],)


def test_contents_count_a_row_of_what_is_looked_up(tmp_path: Path) -> None:
    """A table that is only looked up costs a row of each step, one that is a head too costs all of it."""
    path = tied_model(tmp_path / "tied.onnx")
    assert contents_of(read_model(path)).bytes_per_step == 2 * 48 * 32
    message = onnx.load(path)
    del message.graph.node[1:]
    message.graph.output[0].name = "rows"
    onnx.save(message, path)
    assert contents_of(read_model(path)).bytes_per_step == 2 * 32


@pytest.mark.parametrize(("dtype", "form"), [(np.float32, "sparse-float32"), (np.int8, "sparse-int8")])
def test_contents_of_packed_weights(tmp_path: Path, dtype: type[np.generic], form: str) -> None:
    """They are named by the type of their values, and all of their parts are read."""
    W = pruned_matrix((32, 64), 0.5).astype(dtype)
    found = contents_of(read_model(packed_product(tmp_path / "p.onnx", W, np.zeros(1, np.float32))))
    assert (found.form, found.packed_products, found.products, found.float_products) == (form, 1, 1, 0)
    width = np.dtype(dtype).itemsize
    assert found.bytes_per_step == 32 * 8 + (1024 * width + 64) + 3 * 8 + 4 + 4
