"""Weights and attributes that break a rule of FORMAT.md: an error that says which, never a crash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from runtime_samples import (
    NAMES,
    attributes_of,
    model_of,
    needs_library,
    open_session,
    random_packed,
    tensor_of,
    tensors_of,
)

pytestmark = needs_library

ROWS, COLUMNS = 20, 70
X = np.ones((2, COLUMNS), np.float32)


@dataclass
class Parts:
    """A model's tensors and attributes, to be broken."""

    tensors: dict[str, onnx.TensorProto]
    attributes: dict[str, int]

    def put(self, name: str, array: Any, element_type: int | None = None) -> None:
        self.tensors[name] = tensor_of(name, array, element_type or self.tensors[name].data_type)

    def array(self, name: str) -> Any:
        return onnx.numpy_helper.to_array(self.tensors[name]).copy()

    def change(self, name: str, index: Any, value: Any) -> None:
        array = self.array(name)
        array[index] = value
        self.put(name, array)


def good_parts() -> Parts:
    packed = random_packed(ROWS, COLUMNS, "int8", group_size=64)
    return Parts(tensors_of(packed, np.ones(ROWS, np.float32)), attributes_of(packed))


def set_attribute(name: str, value: int) -> Callable[[Parts], None]:
    return lambda parts: parts.attributes.update({name: value})


def drop_last(name: str) -> Callable[[Parts], None]:
    return lambda parts: parts.put(name, parts.array(name)[:-1])


def flip_bit(parts: Parts) -> None:
    parts.change("mask", (3, 2), parts.array("mask")[3, 2] ^ 16)


def swap_offsets(parts: Parts) -> None:
    parts.change("offsets", slice(None), [0, 1 << 40, parts.array("offsets")[2]])


def float_values(parts: Parts) -> None:
    floats = parts.array("values").astype(np.float32)[: -64 + 16]
    parts.put("values", floats, TensorProto.FLOAT)
    parts.attributes["activation_bits"] = 8


BROKEN: dict[str, tuple[Callable[[Parts], None], str]] = {
    "unknown version": (set_attribute("format_version", 2), "format_version 2 is unknown"),
    "no columns": (set_attribute("columns", 0), "columns must be from 1"),
    "negative columns": (set_attribute("columns", -8), "columns must be from 1"),
    "too many columns": (set_attribute("columns", 1 << 31), "columns must be from 1"),
    "other columns": (set_attribute("columns", 100), "mask must have 13 bytes in a row"),
    "group of 32": (set_attribute("group_size", 32), "multiple of 64"),
    "negative group": (set_attribute("group_size", -64), "multiple of 64"),
    "other group": (set_attribute("group_size", 128), r"scales must have the shape \(20, 1\)"),
    "4 activation bits": (set_attribute("activation_bits", 4), "activation_bits must be 32 or 8"),
    "float values, 8 activation bits": (float_values, "for int8 and int4"),
    "int32 values": (
        lambda p: p.put("values", np.zeros(9, np.int32), TensorProto.INT32),
        "values must be float32",
    ),
    "int32 offsets": (
        lambda p: p.put("offsets", p.array("offsets").astype(np.int32), TensorProto.INT32),
        r"tensor\(int32\).*\(offsets\)",  # this one and the next are ONNX Runtime's own check
    ),
    "int8 mask": (lambda p: p.put("mask", p.array("mask"), TensorProto.INT8), r"tensor\(int8\).*\(mask\)"),
    "mask of rank 1": (lambda p: p.put("mask", p.array("mask").ravel()), "mask must have 2 axes"),
    "values of rank 2": (lambda p: p.put("values", p.array("values")[None]), "values must have 1 axes"),
    "offsets of rank 2": (lambda p: p.put("offsets", p.array("offsets")[None]), "offsets must have 1 axes"),
    "scales of rank 1": (lambda p: p.put("scales", p.array("scales")[:, 0]), "scales must have 2 axes"),
    "scalar bias": (lambda p: p.put("bias", np.float32(1)), "bias must have 1 axes"),
    "ten axes": (lambda p: p.put("values", p.array("values").reshape(-1, *[1] * 9)), "1 axes, but has 10"),
    "narrow mask": (lambda p: p.put("mask", p.array("mask")[:, :-1]), "9 bytes in a row"),
    "fewer rows": (drop_last("mask"), r"scales must have the shape \(19, 2\)"),
    "fewer offsets": (drop_last("offsets"), "offsets must have 3 entries"),
    "no offsets": (lambda p: p.put("offsets", np.zeros(0, np.int64)), "offsets must have 3 entries"),
    "bit past the end": (
        lambda p: p.change("mask", (7, 8), 0x40),
        "row 7 of mask has bits set beyond its 70",
    ),
    "bit too many": (flip_bit, "by the bits of mask"),
    "offsets from 1": (lambda p: p.change("offsets", 0, 1), "must start at 0"),
    "falling offsets": (swap_offsets, r"offsets\[1\] must be"),
    "negative offset": (lambda p: p.change("offsets", 1, -1), r"offsets\[1\] must be"),
    "last offset": (lambda p: p.change("offsets", 2, 1 << 62), r"offsets\[2\] must be"),
    "no padding": (lambda p: p.put("values", p.array("values")[:-64]), "64 of padding"),
    "a value short": (drop_last("values"), "64 of padding"),
    "a value more": (lambda p: p.put("values", np.append(p.array("values"), np.int8(0))), "64 of padding"),
    "no values": (lambda p: p.put("values", np.zeros(0, np.int8)), "64 of padding"),
    "one scale row": (
        lambda p: p.put("scales", p.array("scales")[:1]),
        r"scales must have the shape \(20, 2\)",
    ),
    "two biases": (lambda p: p.put("bias", np.ones(2, np.float32)), r"bias must have the shape \(20\)"),
    "no bias": (lambda p: p.put("bias", np.zeros(0, np.float32)), r"bias must have the shape \(20\)"),
}


def test_the_parts_are_good_before_they_are_broken() -> None:
    """What follows is refused for the one thing that each case breaks."""
    parts = good_parts()
    y = open_session(model_of(parts.tensors, parts.attributes)).run(None, {"x": X})[0]
    assert np.isfinite(y).all()


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weight_is_refused_when_the_model_is_loaded(case: str) -> None:
    """Where the weight lies in the file, no session comes into being."""
    spoil, message = BROKEN[case]
    parts = good_parts()
    spoil(parts)
    with pytest.raises(
        Exception, match=message
    ):  # ONNX Runtime's exceptions share no base class but Exception
        open_session(model_of(parts.tensors, parts.attributes))


TENSOR_CASES = [
    "bit past the end",
    "bit too many",
    "falling offsets",
    "no padding",
    "one scale row",
    "two biases",
]


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_broken_weight_that_is_fed_is_refused_at_every_call(case: str) -> None:
    """Where the weight comes with the call, the call fails, and the next good one works."""
    spoil, message = BROKEN[case]
    good, bad = good_parts(), good_parts()
    spoil(bad)
    model = model_of(good.tensors, good.attributes, fed=NAMES)
    for value in model.graph.input[1:]:
        for axis in value.type.tensor_type.shape.dim:
            axis.Clear()
    session = open_session(model)
    fed = {name: good.array(name) for name in NAMES}
    assert session.run(None, {"x": X, **fed})[0].shape == (2, ROWS)
    with pytest.raises(Exception, match=message):
        session.run(None, {"x": X, **{name: bad.array(name) for name in NAMES}})
    assert session.run(None, {"x": X, **fed})[0].shape == (2, ROWS)


@pytest.mark.parametrize("attribute", ["format_version", "columns", "group_size", "activation_bits"])
def test_missing_attribute_is_refused(attribute: str) -> None:
    """No attribute has a default."""
    parts = good_parts()
    del parts.attributes[attribute]
    with pytest.raises(Exception, match=attribute):
        open_session(model_of(parts.tensors, parts.attributes))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 69), "last axis of x must be 70"), ((), "1 to 64 axes"), ((2, 0), "must be 70")],
)
def test_x_of_another_shape_is_refused(shape: tuple[int, ...], message: str) -> None:
    """The last axis of x must be the columns of W."""
    parts = good_parts()
    session = open_session(model_of(parts.tensors, parts.attributes, rank=len(shape)))
    with pytest.raises(Exception, match=message):
        session.run(None, {"x": np.ones(shape, np.float32)})


def test_sums_that_could_overflow_are_refused() -> None:
    """With 8 activation bits, one scale over more columns than int32 can sum."""
    packed = random_packed(1, 133_145, "int8", density=0.0)
    with pytest.raises(Exception, match="int32 sums would overflow"):
        open_session(model_of(tensors_of(packed), attributes_of(packed, activation_bits=8)))


@pytest.mark.parametrize("name", ["values", "offsets"])
def test_tensor_at_an_odd_address_is_refused(tmp_path: Path, name: str) -> None:
    """External data at an offset that no processor reads numbers from."""
    packed = random_packed(20, 70, "float32")
    tensors = tensors_of(packed)
    payload = tensors[name].raw_data
    (tmp_path / "model.data").write_bytes(b"\0" * 3 + payload)
    tensors[name].ClearField("raw_data")
    tensors[name].data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.data"), ("offset", "3"), ("length", str(len(payload)))):
        tensors[name].external_data.add(key=key, value=value)
    (tmp_path / "model.onnx").write_bytes(model_of(tensors, attributes_of(packed)).SerializeToString())
    with pytest.raises(Exception, match=f"{name} lies at an address"):
        open_session(tmp_path / "model.onnx")
