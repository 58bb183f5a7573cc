"""Reading .onnx files of any tool, good and bad, without trusting them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_samples import product_model, pruned_matrix, weight_of, write_product

from exporters.errors import ExportError
from exporters.read import read_model


def refusal(path: Path, *, load: bool = False) -> str:
    """The id with which the file is refused, when opened or, if asked for, when its tensors are loaded."""

    def attempt() -> None:
        tensors = read_model(path).tensors
        for tensor in tensors if load else ():
            tensor.load()

    with pytest.raises(ExportError) as refused:
        attempt()
    assert refused.value.remedy
    return refused.value.error_id


def model_with(
    initializers: list[TensorProto] | None = None,
    sparse: list[onnx.SparseTensorProto] | None = None,
    nodes: list[onnx.NodeProto] | None = None,
) -> onnx.ModelProto:
    """A model with the given constants; what it computes does not matter."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])]
    nodes = [helper.make_node("Identity", ["x"], ["y"]), *(nodes or [])]
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, initializers or [], sparse_initializer=sparse or []
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def saved(path: Path, **parts: Any) -> Path:
    """The model with the given constants as a file."""
    path.write_bytes(model_with(**parts).SerializeToString())
    return path


def external(name: str = "w", size: int = 16, **entries: object) -> TensorProto:
    """A float32 vector that says it lies in another file."""
    tensor = TensorProto(
        name=name, dims=[size], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
    )
    for key, value in {"location": "m.data", **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def sparse_of(
    indices: list[Any], shape: tuple[int, ...] = (4, 4), dtype: type = np.int64, count: int | None = None
) -> onnx.SparseTensorProto:
    """A sparse tensor of ones at the given places."""
    values = numpy_helper.from_array(np.ones(len(indices) if count is None else count, np.float32), "w")
    return helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(indices, dtype)), list(shape))


@pytest.mark.parametrize("encoding", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_tensors_come_back_as_they_were_written(tmp_path: Path, dtype: type, encoding: Any) -> None:
    """Our own files give back every value, and where the values are not zero."""
    matrix = pruned_matrix((20, 12), 0.7, dtype=dtype)
    path, _ = write_product(tmp_path, [weight_of("w", matrix)], encoding)
    (tensor,) = read_model(path).tensors
    assert (tensor.name, tensor.shape, tensor.encoding) == ("w", (20, 12), encoding)
    assert tensor.load().dtype == dtype
    assert np.array_equal(tensor.load(), matrix)
    assert np.array_equal(tensor.nonzero(), matrix != 0)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "int64", "uint8", "bool", "int4", "float8_e4m3fn"]
)
def test_inline_tensors_of_other_tools_are_read(tmp_path: Path, dtype: str, raw: bool) -> None:
    """Values inside the file are read in both of protobuf's layouts, small types included."""
    values = np.array([[1, 0, 2], [0, 1, 0]]).astype(np.dtype(dtype))
    tensor = numpy_helper.from_array(values, "w")
    if not raw:
        tensor = helper.make_tensor(
            "w", tensor.data_type, values.shape, values.astype(np.float32).flatten().tolist()
        )
    (found,) = read_model(saved(tmp_path / "m.onnx", initializers=[tensor])).tensors
    assert found.load().dtype == values.dtype
    assert np.array_equal(found.load().astype(np.float32), values.astype(np.float32))
    assert np.array_equal(found.nonzero(), values.astype(np.float32) != 0)


def test_external_four_bit_values_are_unpacked(tmp_path: Path) -> None:
    """Two values to a byte in a data file are read as the values that they are."""
    values = np.array([1, -2, 3], np.dtype("int4"))
    tensor = numpy_helper.from_array(values, "w")
    (tmp_path / "m.data").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="m.data")
    (found,) = read_model(saved(tmp_path / "m.onnx", initializers=[tensor])).tensors
    assert found.load().tolist() == [1, -2, 3]


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("indices", [[1, 6, 15], [[0, 1], [1, 2], [3, 3]]], ids=["linear", "coordinates"])
def test_sparse_tensors_of_other_tools_are_read(tmp_path: Path, indices: list[Any], dtype: type) -> None:
    """Linear indices and coordinates, in raw bytes, give the same matrix."""
    (found,) = read_model(saved(tmp_path / "m.onnx", sparse=[sparse_of(indices, dtype=dtype)])).tensors
    assert np.flatnonzero(found.load()).tolist() == [1, 6, 15]


@pytest.mark.parametrize(
    "indices",
    [[5, 3], [3, 3], [3, 16], [-1, 3], [[1, 2], [0, 3]], [[0, 4], [1, 0]], [[0, 0], [0, 0]]],
    ids=str,
)
def test_sparse_indices_out_of_order_or_range_are_refused(tmp_path: Path, indices: list[Any]) -> None:
    """ONNX Runtime runs such files and gives other numbers; here they are refused."""
    path = saved(tmp_path / "m.onnx", sparse=[sparse_of(indices)])
    assert refusal(path, load=True) == "E-ONNX-SPARSE-INDICES"


@pytest.mark.parametrize(
    "sparse",
    [sparse_of([1, 2], count=3), sparse_of([[1, 2, 0], [2, 2, 0]]), sparse_of([1, 2], dtype=np.float32)],
    ids=["count", "rank", "type"],
)
def test_sparse_indices_that_do_not_fit_the_values_are_refused(tmp_path: Path, sparse: Any) -> None:
    """Indices of another number, rank or type than the tensor needs are refused when the file is opened."""
    assert refusal(saved(tmp_path / "m.onnx", sparse=[sparse])) == "E-ONNX-SPARSE-INDICES"


def test_sparse_tensor_that_expands_beyond_bounds_is_refused(tmp_path: Path) -> None:
    """A few values in a shape of many terabytes are refused before anything is allocated."""
    path = saved(tmp_path / "m.onnx", sparse=[sparse_of([1], shape=(2**22, 2**22))])
    assert refusal(path) == "E-ONNX-TENSOR-MALFORMED"


@pytest.mark.parametrize("dims", [[-4], [2**62, 8], [5]], ids=str)
def test_inline_tensor_of_another_size_is_refused(tmp_path: Path, dims: list[int]) -> None:
    """A shape that its bytes do not fill is refused before anything is allocated."""
    tensor = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, raw_data=bytes(16))
    assert refusal(saved(tmp_path / "m.onnx", initializers=[tensor])) == "E-ONNX-TENSOR-MALFORMED"


@pytest.mark.parametrize("field", ["float_data", "int64_data"])
def test_typed_values_of_another_number_are_refused(tmp_path: Path, field: str) -> None:
    """Values that do not fill the shape are refused when they are loaded."""
    dtype = {"float_data": TensorProto.FLOAT, "int64_data": TensorProto.INT64}[field]
    tensor = TensorProto(name="w", dims=[2**40], data_type=dtype, **{field: [1, 2, 3]})
    path = saved(tmp_path / "m.onnx", initializers=[tensor])
    assert refusal(path, load=True) == "E-ONNX-TENSOR-MALFORMED"


@pytest.mark.parametrize(
    "location", ["", "/etc/hostname", "../m.data", "sub/../../m.data", "..\\m.data", "C:m.data", "m.data\0"]
)
def test_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    """A path that could lead out of the model's folder is not opened, whether or not something is there."""
    (tmp_path / "m.data").write_bytes(bytes(64))
    (tmp_path / "model").mkdir()
    path = saved(tmp_path / "model" / "m.onnx", initializers=[external(location=location)])
    assert refusal(path) == "E-ONNX-DATA-ESCAPES"


def linked(make: Callable[[Path, Path], object], tmp_path: Path) -> Path:
    """A model whose data file was made by ``make(place, file outside)``."""
    (tmp_path / "outside").write_bytes(bytes(64))
    (tmp_path / "model").mkdir()
    make(tmp_path / "model" / "m.data", tmp_path / "outside")
    return saved(tmp_path / "model" / "m.onnx", initializers=[external()])


@pytest.mark.parametrize(
    "make",
    [Path.symlink_to, Path.hardlink_to, lambda place, _: os.mkfifo(place), lambda place, _: place.mkdir()],
    ids=["symlink", "hardlink", "pipe", "folder"],
)
def test_data_that_is_no_plain_file_is_refused(tmp_path: Path, make: Callable[[Path, Path], object]) -> None:
    """Links that lead out, pipes and folders in the place of the data are refused without waiting."""
    assert refusal(linked(make, tmp_path)) in {"E-ONNX-DATA-ESCAPES", "E-ONNX-DATA-MISSING"}


def test_data_in_a_constant_of_a_node_is_contained_too(tmp_path: Path) -> None:
    """Constants inside nodes and inner graphs obey the same rules as initializers."""
    tensor = external(location="../secret")
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    node = helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner)
    assert refusal(saved(tmp_path / "m.onnx", nodes=[node])) == "E-ONNX-DATA-ESCAPES"


def test_strings_in_other_files_are_refused(tmp_path: Path) -> None:
    """Strings cannot lie in external data, so nothing is looked for there."""
    tensor = external(location="../secret")
    tensor.data_type = TensorProto.STRING
    assert refusal(saved(tmp_path / "m.onnx", initializers=[tensor])) == "E-ONNX-TENSOR-MALFORMED"


def test_missing_data_is_named(tmp_path: Path) -> None:
    """The message has the tensor and the file that should be there."""
    path = saved(tmp_path / "m.onnx", initializers=[external()])
    with pytest.raises(ExportError, match=r"^E-ONNX-DATA-MISSING: w: .*m\.data"):
        read_model(path)


@pytest.mark.parametrize(
    "entries", [{"offset": 4}, {"offset": 2**62}, {"size": 2**40}, {"size": 17}], ids=str
)
def test_data_that_ends_too_early_is_refused(tmp_path: Path, entries: dict[str, int]) -> None:
    """Offset and shape must lie within the data file; nothing is allocated before that is known."""
    (tmp_path / "m.data").write_bytes(bytes(64))
    path = saved(tmp_path / "m.onnx", initializers=[external(**entries)])
    assert refusal(path) == "E-ONNX-DATA-TRUNCATED"


@pytest.mark.parametrize(
    "entries", [{"offset": -4}, {"offset": "4x"}, {"length": 32}, {"length": "9" * 30}], ids=str
)
def test_data_entries_without_sense_are_refused(tmp_path: Path, entries: dict[str, object]) -> None:
    """Offsets that are no numbers and lengths other than the shape needs are refused."""
    (tmp_path / "m.data").write_bytes(bytes(64))
    path = saved(tmp_path / "m.onnx", initializers=[external(**entries)])
    assert refusal(path) == "E-ONNX-DATA-MALFORMED"


def test_data_cut_after_opening_is_an_error(tmp_path: Path) -> None:
    """A data file that shrinks between opening and reading gives an error, not a crash."""
    path, _ = write_product(tmp_path, [weight_of("w", pruned_matrix((16, 16), 0.0))])
    model = read_model(path)
    (tmp_path / "model.onnx.data").write_bytes(bytes(100))
    with pytest.raises(ExportError) as refused:
        model.tensors[0].load()
    assert refused.value.error_id == "E-ONNX-DATA-TRUNCATED"


def test_every_cut_file_is_refused(tmp_path: Path) -> None:
    """However many bytes are missing at the end, the file is refused as cut or as no model."""
    path, _ = write_product(tmp_path, [weight_of("w", pruned_matrix((12, 12), 0.8))])
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert refusal(path) in {"E-ONNX-TRUNCATED", "E-ONNX-CORRUPT"}


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model", b"\0" * 100, b"\x0a\x02hi", bytes(range(255, 191, -1))],
    ids=["empty", "text", "zeros", "cut", "high bytes"],
)
def test_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    """Bytes that are no ONNX model give an id."""
    (tmp_path / "m.onnx").write_bytes(content)
    assert refusal(tmp_path / "m.onnx") in {"E-ONNX-TRUNCATED", "E-ONNX-CORRUPT"}


def test_absent_file_folder_and_pipe_are_refused(tmp_path: Path) -> None:
    """Without a regular file at the path there is no model, and nothing waits for one."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent.onnx", tmp_path, tmp_path / "pipe"):
        assert refusal(path) == "E-ONNX-NOT-FOUND"


def test_file_beyond_protobuf_is_refused(tmp_path: Path) -> None:
    """A model file of more than 2 GiB, which nothing can load, is refused without being read."""
    with (tmp_path / "m.onnx").open("wb") as stream:
        stream.truncate(2**31)
    assert refusal(tmp_path / "m.onnx") == "E-ONNX-TOO-LARGE"


def test_no_changed_byte_brings_another_error(tmp_path: Path) -> None:
    """Whatever one byte of the model file becomes, reading ends well or with an error that has an id."""
    matrices = [pruned_matrix((12, 12), 0.8), pruned_matrix((12, 4), 0.0)]
    path, _ = write_product(tmp_path, [weight_of(f"w{i}", matrix) for i, matrix in enumerate(matrices)])
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            for tensor in read_model(path).tensors:
                tensor.nonzero()
        except ExportError:
            refused += 1
    assert 0 < refused < len(content)


def test_model_split_into_fragments_is_one(tmp_path: Path) -> None:
    """Messages that follow each other are merged, as protobuf does."""
    first, second = model_with(), onnx.ModelProto()
    second.graph.sparse_initializer.append(sparse_of([2, 9]))
    (tmp_path / "m.onnx").write_bytes(first.SerializeToString() + second.SerializeToString())
    (tensor,) = read_model(tmp_path / "m.onnx").tensors
    assert np.flatnonzero(tensor.load()).tolist() == [2, 9]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], -2),
        ([helper.make_node("MatMul", ["w", "x"], ["y"])], -1),
        ([helper.make_node("Gemm", ["x", "w"], ["y"])], -2),
        ([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], -1),
        (
            [
                helper.make_node("Cast", ["w"], ["c"], to=1),
                helper.make_node("Transpose", ["c"], ["t"], perm=[1, 0]),
                helper.make_node("MatMul", ["x", "t"], ["y"]),
            ],
            -1,
        ),
        ([helper.make_node("Gather", ["w", "x"], ["y"])], None),
        (
            [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["w", "x"], ["z"])],
            None,
        ),
    ],
    ids=["matmul", "left", "gemm", "gemm-transposed", "transposed", "embedding", "both-ways"],
)
def test_input_axis_is_read_from_the_use(
    tmp_path: Path, nodes: list[onnx.NodeProto], expected: int | None
) -> None:
    """The axis that a product sums over is the axis of the inputs, through casts and transposes."""
    proto = product_model([weight_of("w", pruned_matrix((4, 4), 0.5))])
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.append(numpy_helper.from_array(pruned_matrix((4, 4), 0.5), "w"))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert read_model(tmp_path / "m.onnx").tensors[0].input_axis == expected


@pytest.mark.parametrize("choose", ["Gather", "GatherND"])
def test_input_axis_of_experts_is_read_through_their_choice(tmp_path: Path, choose: str) -> None:
    """Experts are chosen by number before they multiply; their inputs lie where the product sums."""
    nodes = [helper.make_node(choose, ["w", "x"], ["e"]), helper.make_node("MatMul", ["e", "x"], ["z"])]
    experts = numpy_helper.from_array(pruned_matrix((3, 4, 4), 0.5), "w")
    path = saved(tmp_path / "m.onnx", initializers=[experts], nodes=nodes)
    assert read_model(path).tensors[0].input_axis == -1


def test_input_axis_in_a_graph_with_a_cycle_ends(tmp_path: Path) -> None:
    """A broken graph whose nodes feed each other does not hang the reader."""
    nodes = [helper.make_node("Cast", ["w"], ["a"], to=1), helper.make_node("Cast", ["a"], ["w"], to=1)]
    weight = numpy_helper.from_array(pruned_matrix((4, 4), 0.5), "w")
    path = saved(tmp_path / "m.onnx", initializers=[weight], nodes=nodes)
    assert read_model(path).tensors[0].input_axis is None
