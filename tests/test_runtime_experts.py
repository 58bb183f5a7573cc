"""The operator of a mixture of experts: what SparseMatMul gives for each expert's matrix and the rows that go to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from runtime_samples import (
    DTYPES,
    NAMES,
    Floats,
    attributes_of,
    exact_product,
    model_of_experts,
    multiply,
    needs_library,
    open_session,
    random_packed,
    rounded_rows,
    tensor_of,
    tensors_of,
)

from blockpress_runtime.packing import PADDING_BYTES, PackedMatrix, ValueType, pack

pytestmark = needs_library

Numbers = NDArray[np.int64]

TOLERANCE = 1e-6  # of the sum of |w||x|, as for SparseMatMul
COLUMNS = 130
WIDTH = 32
KINDS = [(dtype, bits) for dtype in DTYPES for bits in ((32, 8) if dtype in ("int8", "int4") else (32,))]


def some_rows(count: int, columns: int = COLUMNS) -> Floats:
    return np.random.default_rng(1).standard_normal((count, columns)).astype(np.float32)


def some_experts(rows: int, count: int) -> Numbers:
    return np.random.default_rng(2).integers(0, count, rows)


def multiply_experts(
    x: Floats,
    experts: Numbers,
    packed: PackedMatrix,
    bias: Floats | None = None,
    *,
    width: int = WIDTH,
    bits: int = 32,
    threads: int = 1,
) -> Floats:
    model = model_of_experts(tensors_of(packed, bias), attributes_of(packed, bits), width, rank=x.ndim)
    result: Floats = open_session(model, threads).run(None, {"x": x, "experts": experts})[0]
    return result


def one_expert(packed: PackedMatrix, number: int, width: int) -> PackedMatrix:
    """The matrix of one expert by itself."""
    rows = slice(number * width, (number + 1) * width)
    offsets = packed.offsets[rows.start // 16 : rows.stop // 16 + 1]
    padding = np.zeros(PADDING_BYTES // packed.values.itemsize, packed.values.dtype)
    return replace(
        packed,
        mask=packed.mask[rows],
        values=np.concatenate([packed.values[offsets[0] : offsets[-1]], padding]),
        offsets=offsets - offsets[0],
        scales=packed.scales if packed.scales.shape == (1, 1) else packed.scales[rows],
    )


def check_same(
    x: Floats,
    experts: Numbers,
    packed: PackedMatrix,
    bias: Floats | None = None,
    *,
    width: int = WIDTH,
    bits: int = 32,
    threads: int = 1,
) -> None:
    """The bits that SparseMatMul gives for each expert, and what float64 gives."""
    y = multiply_experts(x, experts, packed, bias, width=width, bits=bits, threads=threads)
    assert y.shape == (len(x), width)
    for number in np.unique(experts):
        rows = experts == number
        matrix = one_expert(packed, number, width)
        own = bias if bias is None or len(bias) == 1 else bias[number * width : (number + 1) * width]
        np.testing.assert_array_equal(y[rows], multiply(x[rows], matrix, own, bits))
        used: Any = x[rows]
        if bits == 8:
            integers, step = rounded_rows(x[rows])
            used = integers * step.astype(np.float64)
        exact, terms = exact_product(used, matrix, own)
        assert (np.abs(y[rows] - exact) <= TOLERANCE * terms).all()


@pytest.mark.parametrize("columns", [7, 128, COLUMNS])
@pytest.mark.parametrize(("dtype", "bits"), KINDS)
def test_each_row_meets_the_matrix_of_its_expert(dtype: ValueType, bits: int, columns: int) -> None:
    """Every value type, rounded x and not, few and many rows to an expert, with a bias of each row of W."""
    packed = random_packed(3 * WIDTH, columns, dtype)
    bias = some_rows(1, packed.rows)[0]
    for count in (1, 2, 7, 70):
        check_same(some_rows(count, columns), some_experts(count, 3), packed, bias, bits=bits)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_each_expert_has_its_own_scales(dtype: ValueType, group_size: int, bits: int) -> None:
    """Several scales to a row of W."""
    packed = random_packed(3 * WIDTH, 200, dtype, group_size=group_size)
    check_same(some_rows(20, 200), some_experts(20, 3), packed, bits=bits)


@pytest.mark.parametrize("bits", [32, 8])
def test_one_scale_and_one_bias_hold_for_every_expert(bits: int) -> None:
    """Scales of the shape (1, 1) and a bias of the shape (1,)."""
    weights = np.random.default_rng(3).integers(-127, 128, (4 * WIDTH, COLUMNS))
    packed = pack(weights, "int8", np.full((1, 1), 0.03, np.float32))
    check_same(some_rows(9), some_experts(9, 4), packed, np.full(1, 0.5, np.float32), bits=bits)


@pytest.mark.parametrize("width", [16, 48])
@pytest.mark.parametrize(
    ("count", "experts"),
    [
        (1, [0, 0, 0]),
        (1, [0] * 40),
        (3, [2]),
        (3, [1] * 17),
        (3, [0, 1, 2, 0, 1, 2] * 6),
        (3, [2] * 9 + [0] * 6),
        (8, [7, 0]),
        (8, [3, 3, 5, 3, 5, 5, 5, 5, 3, 6]),
        (8, [1] * 5 + [4] * 6 + [7]),
        (8, [0] + [6] * 600),  # more rows than one walk over W serves
    ],
)
def test_experts_may_have_any_rows_of_x(count: int, experts: list[int], width: int) -> None:
    """None, one, some and all of them, beside each other and apart, in the order of the experts and not."""
    packed = random_packed(count * width, COLUMNS, "int8")
    for bits in (32, 8):
        check_same(some_rows(len(experts)), np.array(experts), packed, width=width, bits=bits)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 4), (0,), (2, 0, 3)])
def test_leading_axes_are_kept(leading: tuple[int, ...]) -> None:
    """x of any rank and experts of one less, with no rows too."""
    packed = random_packed(3 * WIDTH, COLUMNS, "int8")
    x = some_rows(int(np.prod(leading, dtype=int)))
    experts = some_experts(len(x), 3)
    y = multiply_experts(x.reshape(*leading, COLUMNS), experts.reshape(leading), packed)
    assert y.shape == (*leading, WIDTH)
    if y.size:
        np.testing.assert_array_equal(y.reshape(-1, WIDTH), multiply_experts(x, experts, packed))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("count", [1, 4, 300])
def test_threads_share_the_strips_of_all_experts(count: int, bits: int) -> None:
    """So many weights that tasks begin in one expert and end in the next: the same bits."""
    packed = random_packed(4 * 464, 1024, "int8")
    x, experts = some_rows(count, 1024), some_experts(count, 4)
    check_same(x, experts, packed, some_rows(1, packed.rows)[0], width=464, bits=bits, threads=2)


def test_row_that_is_not_finite_gives_nan_alone() -> None:
    """A NaN in a rounded row makes all its outputs NaN, and those of no other row of its expert."""
    packed = random_packed(2 * WIDTH, COLUMNS, "int8")
    x = some_rows(6)
    x[3, 5] = np.nan
    y = multiply_experts(x, np.array([1, 0, 1, 1, 0, 1]), packed, bits=8)
    assert np.isnan(y[3]).all()
    assert np.isfinite(np.delete(y, 3, axis=0)).all()


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_weights_that_are_fed_give_the_same(dtype: ValueType) -> None:
    """Tensors that come with every call: the same bits."""
    packed = random_packed(3 * WIDTH, COLUMNS, dtype)
    bias = some_rows(1, packed.rows)[0]
    x, experts = some_rows(8), some_experts(8, 3)
    model = model_of_experts(tensors_of(packed, bias), attributes_of(packed), WIDTH, fed=NAMES)
    fed = {name: getattr(packed, name) for name in NAMES if name != "bias"}
    y = open_session(model).run(None, {"x": x, "experts": experts, "bias": bias, **fed})[0]
    np.testing.assert_array_equal(y, multiply_experts(x, experts, packed, bias))


def test_numbers_of_experts_may_lie_in_the_file() -> None:
    """A constant is an input as any other."""
    packed = random_packed(3 * WIDTH, COLUMNS, "int8")
    x, experts = some_rows(8), some_experts(8, 3)
    model = model_of_experts(tensors_of(packed), attributes_of(packed), WIDTH)
    model.graph.input.pop()
    model.graph.initializer.append(tensor_of("experts", experts, TensorProto.INT64))
    y = open_session(model).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, multiply_experts(x, experts, packed))


def test_without_experts_there_are_no_rows_of_x() -> None:
    """A mask of no rows is that of no experts, of which a row of x can meet none."""
    packed = random_packed(0, COLUMNS, "int8")
    assert multiply_experts(some_rows(0), some_experts(0, 1), packed).shape == (0, WIDTH)
    with pytest.raises(Exception, match="there are rows of x, but no experts"):
        multiply_experts(some_rows(2), some_experts(2, 1), packed)


@pytest.mark.parametrize("number", [-1, 8, 9, 2**31, 2**32, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("place", [0, 3, 39])
def test_number_that_is_no_expert_is_refused_at_the_call(number: int, place: int) -> None:
    """The call fails, and the next good one works."""
    packed = random_packed(8 * 16, COLUMNS, "int8")
    x, experts = some_rows(40), some_experts(40, 8)
    session = open_session(model_of_experts(tensors_of(packed), attributes_of(packed, 8), 16))
    broken = experts.copy()
    broken[place] = number
    message = rf"SparseExpertMatMul: experts\[{place}\] must be from 0 to 7, but is {number}"
    with pytest.raises(Exception, match=message):
        session.run(None, {"x": x, "experts": broken})
    y = session.run(None, {"x": x, "experts": experts})[0]
    np.testing.assert_array_equal(y, multiply_experts(x, experts, packed, width=16, bits=8))


@pytest.mark.parametrize(
    ("x", "experts", "message"),
    [
        ((2, 3), (2, 2), "axis 1 of experts must be 3 as that of x, but is 2"),
        ((2, 3), (3, 2), "axis 0 of experts must be 2"),
        ((2, 3), (6,), "experts must have the 2 leading axes of x, but has 1 axes"),
        ((2, 3), (2, 3, 1), "but has 3 axes"),
        ((2, 3), (), "but has 0 axes"),
        ((), (1,), "must have the 0 leading axes of x, but has 1 axes"),
        ((0, 3), (0, 2), "axis 1 of experts must be 3"),
        ((2, 0), (2, 1), "axis 1 of experts must be 0"),
    ],
)
def test_experts_of_another_shape_than_the_rows_are_refused(
    x: tuple[int, ...], experts: tuple[int, ...], message: str
) -> None:
    """Each row of x goes to one expert."""
    packed = random_packed(2 * WIDTH, COLUMNS, "int8")
    with pytest.raises(Exception, match=f"SparseExpertMatMul: .*{message}"):
        multiply_experts(np.ones((*x, COLUMNS), np.float32), np.zeros(experts, np.int64), packed)


def test_x_of_another_shape_is_refused() -> None:
    """The last axis of x must be the columns of W."""
    packed = random_packed(2 * WIDTH, COLUMNS, "int8")
    with pytest.raises(Exception, match="SparseExpertMatMul: the last axis of x must be 130, but is 129"):
        multiply_experts(some_rows(2, 129), some_experts(2, 2), packed)


@pytest.mark.parametrize("element_type", [TensorProto.INT32, TensorProto.FLOAT])
def test_numbers_of_another_type_are_refused(element_type: int) -> None:
    """By ONNX Runtime itself, when the model is loaded."""
    packed = random_packed(2 * WIDTH, COLUMNS, "int8")
    model = model_of_experts(tensors_of(packed), attributes_of(packed), WIDTH)
    model.graph.input[-1].type.tensor_type.elem_type = element_type
    with pytest.raises(Exception, match=r"tensor\((int32|float)\).*\(experts\)"):
        open_session(model)


def test_numbers_at_an_odd_address_are_refused(tmp_path: Path) -> None:
    """External data at an offset that no processor reads numbers from."""
    packed = random_packed(2 * WIDTH, COLUMNS, "int8")
    model = model_of_experts(tensors_of(packed), attributes_of(packed), WIDTH)
    model.graph.input.pop()
    tensor = model.graph.initializer.add(name="experts", data_type=TensorProto.INT64, dims=[16])
    tensor.data_location = TensorProto.EXTERNAL
    (tmp_path / "model.data").write_bytes(bytes(3 + 16 * 8))
    for key, value in (("location", "model.data"), ("offset", "3"), ("length", str(16 * 8))):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match="experts lies at an address that is no multiple of 8"):
        open_session(tmp_path / "model.onnx").run(None, {"x": some_rows(16)})


@pytest.mark.parametrize("expert_rows", [0, -16, 8, 24, 100, 2**63 - 1, -(2**63)])
def test_rows_of_an_expert_that_are_no_whole_strips_are_refused(expert_rows: int) -> None:
    """Every expert begins with a strip."""
    packed = random_packed(96, COLUMNS, "int8")
    message = f"SparseExpertMatMul: expert_rows must be a multiple of 16 from 16 on, but is {expert_rows}"
    with pytest.raises(Exception, match=message):
        open_session(model_of_experts(tensors_of(packed), attributes_of(packed), expert_rows))


@pytest.mark.parametrize("expert_rows", [64, 112, 2**63 - 16])
def test_rows_that_are_no_whole_experts_are_refused(expert_rows: int) -> None:
    """When the model is loaded, and at the call where the weights are fed."""
    packed = random_packed(96, COLUMNS, "int8")
    tensors, attributes = tensors_of(packed), attributes_of(packed)
    message = f"the rows of mask must be a multiple of expert_rows, {expert_rows}, but are 96"
    with pytest.raises(Exception, match=message):
        open_session(model_of_experts(tensors, attributes, expert_rows))
    session = open_session(model_of_experts(tensors, attributes, expert_rows, fed=("mask",)))
    with pytest.raises(Exception, match=message):
        session.run(None, {"x": some_rows(1), "experts": some_experts(1, 1), "mask": packed.mask})


@pytest.mark.parametrize(
    "attribute", ["format_version", "columns", "group_size", "activation_bits", "expert_rows"]
)
def test_missing_attribute_is_refused(attribute: str) -> None:
    """No attribute has a default."""
    packed = random_packed(2 * WIDTH, COLUMNS, "int8")
    model = model_of_experts(tensors_of(packed), attributes_of(packed), WIDTH)
    kept = [given for given in model.graph.node[0].attribute if given.name != attribute]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(Exception, match=attribute):
        open_session(model)


def change(name: str, index: Any, value: Any) -> Callable[[dict[str, onnx.TensorProto]], None]:
    def spoil(tensors: dict[str, onnx.TensorProto]) -> None:
        array = onnx.numpy_helper.to_array(tensors[name]).copy()
        array[index] = value
        tensors[name] = tensor_of(name, array, tensors[name].data_type)

    return spoil


def shorten(name: str) -> Callable[[dict[str, onnx.TensorProto]], None]:
    def spoil(tensors: dict[str, onnx.TensorProto]) -> None:
        array = onnx.numpy_helper.to_array(tensors[name])[:-1]
        tensors[name] = tensor_of(name, array, tensors[name].data_type)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("offsets", 3, 1), r"offsets\[3\] must be"),
        (change("mask", (40, 16), 0xFF), "row 40 of mask has bits set beyond its 130"),
        (shorten("values"), "values must have .* and 64 of padding"),
        (shorten("offsets"), "offsets must have 7 entries for 96 rows"),
        (shorten("scales"), r"scales must have the shape \(96, 1\)"),
        (shorten("bias"), r"bias must have the shape \(96\)"),
        (shorten("mask"), r"scales must have the shape \(95, 1\)"),
    ],
)
def test_broken_weight_is_refused_as_that_of_one_matrix_is(
    spoil: Callable[[dict[str, onnx.TensorProto]], None], message: str
) -> None:
    """The matrices of all experts are checked as one."""
    packed = random_packed(3 * WIDTH, COLUMNS, "int8")
    tensors = tensors_of(packed, np.ones(packed.rows, np.float32))
    spoil(tensors)
    with pytest.raises(Exception, match=f"SparseExpertMatMul: {message}"):
        open_session(model_of_experts(tensors, attributes_of(packed), WIDTH))
