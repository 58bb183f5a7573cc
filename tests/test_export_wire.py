"""The model file and its data file as they are written: their bytes, and that others can read them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_samples import Weight, product_model, pruned_matrix, run_product, weight_of, write_product

from exporters import wire
from exporters.errors import ExportError
from exporters.protobuf import (
    fields,
    pack_ascending,
    packed_index_bytes,
    packed_indices,
    unpack_varints,
    varint,
)
from exporters.read import read_model

BOUNDARIES = [0, 1, 127, 128, 16383, 16384, 2**21 - 1, 2**21, 2**28 - 1, 2**28, 2**31 - 1]


def packed_by_protobuf(numbers: list[int]) -> bytes:
    """What protobuf itself writes for ``int64_data``."""
    message = TensorProto(int64_data=numbers).SerializeToString()
    (field,) = fields(message, 0, len(message))
    return message[field.payload : field.end]


def test_varints_are_those_of_protobuf() -> None:
    """Indices packed in bulk are the bytes that protobuf writes, at every change of length."""
    assert pack_ascending(np.array(BOUNDARIES)) == packed_by_protobuf(BOUNDARIES)
    assert b"".join(varint(number) for number in BOUNDARIES) == packed_by_protobuf(BOUNDARIES)


def test_varints_unpack_to_the_same_numbers() -> None:
    """Unpacking gives back numbers of every length, negative ones too."""
    numbers = [*BOUNDARIES, 2**63 - 1, -1, -(2**63)]
    assert unpack_varints(packed_by_protobuf(numbers)).tolist() == numbers


def test_varints_unpack_across_pieces() -> None:
    """Numbers that lie across the border of two pieces of work are whole."""
    numbers = np.arange(600_000) + 2**14
    assert np.array_equal(unpack_varints(pack_ascending(numbers)), numbers)


@pytest.mark.parametrize("packed", [b"\x80", b"\x01\xff", b"\x80" * 10 + b"\x01"])
def test_varints_that_are_cut_or_endless_are_refused(packed: bytes) -> None:
    """A number without an end, or longer than any, is an error."""
    with pytest.raises(ValueError, match="number"):
        unpack_varints(packed)


@pytest.mark.parametrize("size", [0, 100, 128, 20_000, 2**21 + 500])
def test_index_bytes_are_counted_exactly(size: int) -> None:
    """Counting the bytes of the indices gives the length that packing them has."""
    kept = np.random.default_rng(0).random(size) < 0.3
    packed = b"".join(packed_indices(kept))
    assert packed_index_bytes(kept) == len(packed)
    assert np.array_equal(unpack_varints(packed), np.flatnonzero(kept))


def test_fields_of_a_cut_message_raise() -> None:
    """A message that ends inside a field is not taken for a shorter one."""
    message = TensorProto(name="weight", dims=[300], raw_data=b"abc").SerializeToString()
    ends = [0, *(field.end for field in fields(message, 0, len(message)))]
    for stop in sorted(set(range(len(message))) - set(ends)):
        with pytest.raises(EOFError):
            list(fields(message, 0, stop))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_sparse_file_computes_what_the_dense_one_does(tmp_path: Path, dtype: type) -> None:
    """ONNX Runtime gives bit-equal outputs, and the checker accepts both files."""
    weights = [weight_of(f"w{i}", pruned_matrix((48, 48), 0.9, i, dtype)) for i in range(2)]
    outputs = {}
    for encoding in ("dense", "sparse"):
        path, rows = write_product(tmp_path, weights, encoding, encoding)
        assert {row.encoding for row in rows} == {encoding}
        onnx.checker.check_model(str(path))
        outputs[encoding] = run_product(path, 48)
    assert np.array_equal(outputs["dense"], outputs["sparse"])
    assert np.any(outputs["dense"])


def test_experts_of_three_axes_load_sparse(tmp_path: Path) -> None:
    """A sparse initializer of three axes is the same experts to ONNX Runtime."""
    experts = pruned_matrix((3, 16, 8), 0.8)
    weight = weight_of("experts", experts)
    path, (row,) = write_product(tmp_path, [weight], "sparse")
    assert row.encoding == "sparse"
    rows = np.arange(32, dtype=np.float32).reshape(2, 16) % 5 - 2
    assert np.array_equal(run_product(path, 16), rows @ experts)


@pytest.mark.parametrize("opset", [18, 23])
def test_file_is_one_ordinary_model(tmp_path: Path, opset: int) -> None:
    """Protobuf and the checker read one model: its version, metadata, INT64 indices and external values."""
    weights = [weight_of("w", pruned_matrix((32, 32), 0.8)), weight_of("v", pruned_matrix((32, 8), 0.0))]
    path = tmp_path / "m.onnx"
    wire.write_model(
        product_model(weights, opset=opset), weights, path, "m.data", metadata={"source": "unit"}
    )
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    assert model.ir_version <= 10
    assert {entry.key: entry.value for entry in model.metadata_props} == {"source": "unit"}
    (sparse,) = model.graph.sparse_initializer
    assert sparse.indices.data_type == TensorProto.INT64
    assert list(sparse.indices.int64_data) == np.flatnonzero(weights[0].load()).tolist()
    assert {tensor.name for tensor in model.graph.initializer} == {"v"}
    assert sparse.values.data_location == TensorProto.EXTERNAL


def test_file_holds_its_graph_once(tmp_path: Path) -> None:
    """There is one graph field: readers that do not merge repeated messages see all of it."""
    path, _ = write_product(tmp_path, [weight_of(f"w{i}", pruned_matrix((32, 32), 0.8, i)) for i in range(3)])
    content = path.read_bytes()
    assert [field.number for field in fields(content, 0, len(content))].count(7) == 1


def test_metadata_replaces_entries_of_the_same_key(tmp_path: Path) -> None:
    """A key that the graph already carries has the new value, once; the graph given is not changed."""
    weights = [weight_of("w", pruned_matrix((8, 8), 0.5))]
    proto = product_model(weights)
    helper.set_model_props(proto, {"a": "old", "b": "kept"})
    before = proto.SerializeToString(deterministic=True)
    wire.write_model(proto, weights, tmp_path / "m.onnx", "m.data", metadata={"a": "new"})
    model = onnx.load(tmp_path / "m.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props} == {"a": "new", "b": "kept"}
    assert proto.SerializeToString(deterministic=True) == before


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    """Two writes of the same model cannot be told apart."""
    weights = [weight_of(f"w{i}", pruned_matrix((64, 64), 0.7, i)) for i in range(3)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_product(tmp_path / name, weights)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("encoding", ["auto", "dense", "sparse"])
def test_stored_bytes_are_those_in_the_files(tmp_path: Path, encoding: wire.EncodingMode) -> None:
    """The bytes of a row are what the reader finds, and together with the rest they are the files' sizes."""
    values = [pruned_matrix((64, 64), 0.8), pruned_matrix((64, 64), 0.3, 1), pruned_matrix((64, 4), 0.5, 2)]
    weights = [weight_of(f"w{i}", value) for i, value in enumerate(values)]
    path, rows = write_product(tmp_path, weights, encoding)
    found = {tensor.name: tensor.stored_bytes for tensor in read_model(path).tensors}
    assert {row.name: row.stored_bytes for row in rows} == found
    graph_alone, _ = write_product(tmp_path, weights, encoding, "again")
    wire.write_model(product_model(weights), [], graph_alone, "again.data")
    padding = path.with_suffix(".onnx.data").stat().st_size - sum(
        tensor.span.size_bytes for tensor in read_model(path).tensors
    )
    total = path.stat().st_size + path.with_suffix(".onnx.data").stat().st_size
    # Up to two bytes: the graph's length is a longer varint once initializers stand in it.
    assert total - padding - graph_alone.stat().st_size - sum(row.stored_bytes for row in rows) in {0, 1, 2}


def test_dense_values_begin_on_pages(tmp_path: Path) -> None:
    """Large dense tensors lie where a file can be mapped."""
    weights = [weight_of(f"w{i}", pruned_matrix((33, 33), 0.0, i)) for i in range(3)]
    path, _ = write_product(tmp_path, weights)
    assert [tensor.span.offset % wire.PAGE_BYTES for tensor in read_model(path).tensors] == [0, 0, 0]


def test_rows_say_where_the_inputs_are(tmp_path: Path) -> None:
    """A matrix that multiplies from the right sums over its second last axis."""
    _, (row,) = write_product(tmp_path, [weight_of("w", pruned_matrix((16, 8), 0.5))])
    assert (row.input_axis, row.transposed, row.pruned, row.nnz) == (-2, True, True, 64)


def test_writing_a_sparse_tensor_needs_little_memory(tmp_path: Path) -> None:
    """Beside the tensor itself there is its mask, a quarter of it, and a piece of 2^20 elements."""
    values = pruned_matrix((2048, 2048), 0.6)
    weight = Weight("w", values.shape, TensorProto.FLOAT, False, lambda: values.copy())
    proto = product_model([weight])
    tracemalloc.start()
    wire.write_model(proto, [weight], tmp_path / "m.onnx", "m.data", encoding="sparse")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # For a value of the piece: its index twice (8 bytes each), its varint twice (3 each), its mask.
    assert peak < values.nbytes * 1.25 + 2**20 * (8 + 8 + 3 + 3 + 1)


def test_progress_counts_both_loads(tmp_path: Path) -> None:
    """Each weight is loaded twice, and the last call says that all is done."""
    weights = [weight_of(f"w{i}", pruned_matrix((8, 8), 0.5, i)) for i in range(2)]
    seen: list[tuple[int, int]] = []
    wire.write_model(
        product_model(weights),
        weights,
        tmp_path / "m.onnx",
        "m.data",
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_weight_that_changes_between_its_loads_is_an_error(tmp_path: Path) -> None:
    """Lengths were announced before; other zeros would make a broken file."""
    loads = iter([pruned_matrix((8, 8), 0.9), pruned_matrix((8, 8), 0.8)])
    weight = Weight("w", (8, 8), TensorProto.FLOAT, False, lambda: next(loads))
    with pytest.raises(RuntimeError, match="w: loaded twice"):
        write_product(tmp_path, [weight], "sparse")


def test_weight_unlike_its_declaration_is_an_error(tmp_path: Path) -> None:
    """A weight that loads in another type or shape than the graph expects is not written."""
    values = pruned_matrix((8, 8), 0.5, dtype=np.float16)
    with pytest.raises(ValueError, match="w: declared"):
        write_product(tmp_path, [Weight("w", (8, 8), TensorProto.FLOAT, False, lambda: values)])


def test_initializer_given_twice_is_an_error(tmp_path: Path) -> None:
    """Two weights of one name would make an invalid graph."""
    weight = weight_of("w", pruned_matrix((8, 8), 0.5))
    with pytest.raises(ValueError, match="twice"):
        write_product(tmp_path, [weight, weight])


def test_data_file_stays_beside_the_model(tmp_path: Path) -> None:
    """A name with a folder in it is refused before anything is written."""
    weights = [weight_of("w", pruned_matrix((8, 8), 0.5))]
    with pytest.raises(ValueError, match="beside"):
        wire.write_model(product_model(weights), weights, tmp_path / "m.onnx", "../m.data")


def test_graph_beyond_protobuf_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the model file would be too large for protobuf, nothing is written."""
    monkeypatch.setattr(wire, "MAX_MODEL_BYTES", 500)
    with pytest.raises(ExportError) as refused:
        write_product(tmp_path, [weight_of("w", pruned_matrix((64, 64), 0.8))])
    assert refused.value.error_id == "E-EXPORT-TOO-LARGE"
    assert not list(tmp_path.iterdir())
