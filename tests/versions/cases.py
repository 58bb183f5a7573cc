"""Models of one operator each for check.py: good ones with the right numbers, and broken ones with the message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from attention_samples import AttentionCase
from int8_samples import exact_int8_product, parts_of
from int8_samples import model_of as int8_model_of
from onnx import TensorProto
from runtime_samples import (
    DTYPES,
    attributes_of,
    exact_product,
    model_of,
    model_of_experts,
    model_of_several,
    random_packed,
    rounded_rows,
    tensors_of,
)

SHAPES = ((37, 130), (64, 256))


def write_cases(folder: Path) -> None:
    """Every value type, 32 and 8 activation bits, weights inline and in an external file; and broken weights."""
    for dtype in DTYPES:
        for bits in (32, 8) if dtype in ("int8", "int4") else (32,):
            for rows, columns in SHAPES:
                _write_good(folder, f"good-{dtype}-{bits}-{columns}", dtype, bits, rows, columns)
    for count in (2, 3):
        _write_several(folder, count)
    for rows in (3, 40):
        _write_experts(folder, rows)
    for tokens, rotary_width in ((1, 0), (1, 16), (40, 8)):
        for room in (0, 20):
            _write_attention(folder, AttentionCase(tokens=tokens, rotary_width=rotary_width), room)
    for bits in (32, 8):
        _write_int8(folder, bits)
    packed = random_packed(20, 70, "int8")
    broken = {
        "offset": ("offsets", "offsets[1] must be"),
        "length": ("values", "of padding by the bits of mask"),
        "bits": ("mask", "beyond its 70 columns"),
    }
    for name, (tensor, message) in broken.items():
        tensors = tensors_of(packed)
        _spoil(tensors[tensor])
        model = model_of(tensors, attributes_of(packed))
        (folder / f"broken-{name}.onnx").write_bytes(model.SerializeToString())
        (folder / f"broken-{name}.txt").write_text(message, encoding="utf-8")


def _write_good(folder: Path, name: str, dtype: str, bits: int, rows: int, columns: int) -> None:
    group_size = 64 if dtype in ("int8", "int4") else 0
    packed = random_packed(rows, columns, dtype, group_size=group_size)  # type: ignore[arg-type]
    random = np.random.default_rng(3)
    x = random.standard_normal((2, 3, columns)).astype(np.float32)
    bias = random.standard_normal(rows).astype(np.float32)
    used = x.astype(np.float64)
    if bits == 8:
        integers, step = rounded_rows(x)
        used = integers * step.astype(np.float64)
    y, terms = exact_product(used, packed, bias)  # type: ignore[arg-type]
    for place in ("inline", "external"):
        tensors = tensors_of(packed, bias)
        if place == "external":
            move_out(tensors, folder / f"{name}.data")
        model = model_of(tensors, attributes_of(packed, bits), rank=3)
        (folder / f"{name}-{place}.onnx").write_bytes(model.SerializeToString())
        np.savez(folder / f"{name}-{place}.npz", x=x, y1=y, terms1=terms)


def _write_several(folder: Path, count: int) -> None:
    """Several weights in one operator."""
    weights = [random_packed(20 + number, 130, "int8", seed=number) for number in range(count)]
    random = np.random.default_rng(3)
    x = random.standard_normal((6, 130)).astype(np.float32)
    biases = [random.standard_normal(packed.rows).astype(np.float32) for packed in weights]
    biased = list(zip(weights, biases, strict=True))
    integers, step = rounded_rows(x)
    used = integers * step.astype(np.float64)
    exact = [exact_product(used, packed, bias) for packed, bias in biased]
    tensors = [tensors_of(packed, bias) for packed, bias in biased]
    model = model_of_several(tensors, attributes_of(weights[0], 8))
    (folder / f"good-several-{count}.onnx").write_bytes(model.SerializeToString())
    arrays = {"x": x}
    for number, (y, terms) in enumerate(exact, 1):
        arrays |= {f"y{number}": y, f"terms{number}": terms}
    np.savez(folder / f"good-several-{count}.npz", allow_pickle=False, **arrays)


def _write_experts(folder: Path, rows: int) -> None:
    """Experts of which each gets few or many rows of x, in an external file."""
    packed = random_packed(4 * 32, 130, "int8")
    random = np.random.default_rng(3)
    x = random.standard_normal((rows, 130)).astype(np.float32)
    bias = random.standard_normal(packed.rows).astype(np.float32)
    experts = random.integers(0, 4, rows)
    integers, step = rounded_rows(x)
    exact = exact_product(integers * step.astype(np.float64), packed, bias)  # type: ignore[arg-type]
    y, terms = (of_all.reshape(rows, 4, 32)[np.arange(rows), experts] for of_all in exact)
    tensors = tensors_of(packed, bias)
    name = f"good-experts-{rows}"
    move_out(tensors, folder / f"{name}.data")
    model = model_of_experts(tensors, attributes_of(packed, 8), 32)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    np.savez(folder / f"{name}.npz", x=x, experts=experts, y1=y, terms1=terms)


def _write_int8(folder: Path, bits: int) -> None:
    """A dense matrix, in an external file."""
    parts, name = parts_of(37, 130), f"good-dense-int8-{bits}"
    x = np.random.default_rng(3).standard_normal((2, 3, 130)).astype(np.float32)
    model = int8_model_of(parts, bits, leading=2)
    move_out({tensor.name: tensor for tensor in model.graph.initializer}, folder / f"{name}.data")
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    y, terms = exact_int8_product(x, parts, bits)
    np.savez(folder / f"{name}.npz", x=x, y1=y, terms1=terms)


def _write_attention(folder: Path, case: AttentionCase, room: int) -> None:
    """Tokens behind a cache, which may have room for them and so many more."""
    given = case.inputs()
    outputs = case.exact(given)
    if room:
        for part in ("key", "value"):
            exact, terms = outputs[f"present_{part}"]
            outputs[f"present_{part}"] = (_with_places(exact, room), _with_places(terms, room, 1))
            given[f"past_{part}"] = _with_places(given[f"past_{part}"], case.tokens + room)
    name = f"good-attention-{case.tokens}-{case.rotary_width}{'-in-place' if room else ''}"
    (folder / f"{name}.onnx").write_bytes(case.model().SerializeToString())
    arrays = dict(given)
    for number, (exact, terms) in enumerate(outputs.values(), 1):
        arrays |= {f"y{number}": exact, f"terms{number}": terms}
    np.savez(folder / f"{name}.npz", allow_pickle=False, **arrays)


def _with_places(cache: np.ndarray, places: int, filling: float = 0) -> np.ndarray:
    """The cache (B, heads, tokens, width) with so many more tokens of one number."""
    return np.pad(cache, ((0, 0), (0, 0), (0, places), (0, 0)), constant_values=filling)


def move_out(tensors: dict[str, onnx.TensorProto], path: Path) -> None:
    """Put the bytes of the tensors into the file, each from a page on, which is how ONNX Runtime maps them."""
    with path.open("wb") as data:
        for tensor in tensors.values():
            data.write(b"\0" * (-data.tell() % 4096))
            places = {"location": path.name, "offset": data.tell(), "length": len(tensor.raw_data)}
            data.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in places.items():
                tensor.external_data.add(key=key, value=str(value))


def _spoil(tensor: onnx.TensorProto) -> None:
    payload = bytearray(tensor.raw_data)
    if tensor.name == "mask":
        payload[8] |= 0x80  # the last byte of the first row, which holds 6 columns
    elif tensor.name == "offsets":
        payload[8] ^= 1
    else:
        payload.append(0)
        tensor.dims[0] += 1
    tensor.raw_data = bytes(payload)
