"""Masks in a file: one bit per weight, in a safetensors file that any tool can open.

For each full parameter name the file holds a uint8 vector: ``numpy.packbits`` of the flattened (C order) bool
mask, first weight in the lowest bit. The shapes stand in the header under the key ``shapes`` as one JSON
object (one key: safetensors writes several in no fixed order, and equal masks must give equal bytes).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from exporters.errors import ExportError

BoolArray = NDArray[np.bool_]

_CHUNK_ELEMENTS = 2**18
_UNSIGNED_OF_FLOAT = {
    "float16": np.uint16,
    "bfloat16": np.uint16,
    "float32": np.uint32,
    "float64": np.uint64,
}


@dataclass(frozen=True)
class PackedMask:
    """A mask at one bit per weight.

    Attributes:
        bits: uint8, ceil(size / 8) bytes, first weight in the lowest bit of the first byte.
        shape: Shape of the mask.
    """

    bits: NDArray[np.uint8]
    shape: tuple[int, ...]

    def unpack(self) -> BoolArray:
        """The mask as bool, True = kept."""
        count = math.prod(self.shape)
        return np.unpackbits(self.bits, count=count, bitorder="little").view(np.bool_).reshape(self.shape)

    def sha256(self) -> str:
        """Hex digest of the bits."""
        return hashlib.sha256(self.bits.tobytes()).hexdigest()


def pack_mask(mask: BoolArray) -> PackedMask:
    """The mask at one bit per weight. ``mask``: bool of any shape, True = kept."""
    flat = np.ascontiguousarray(mask, dtype=np.bool_).reshape(-1)
    return PackedMask(np.packbits(flat, bitorder="little"), tuple(mask.shape))


def nonzero_mask(values: NDArray[np.generic]) -> BoolArray:
    """Where ``values`` is not zero, in its shape; NaN is not zero, negative zero is.

    Floats are compared as bits without their sign, which is several times faster for the 16-bit kinds, and
    piece by piece, which needs no second array of their size.
    """
    unsigned = _UNSIGNED_OF_FLOAT.get(values.dtype.name)
    if unsigned is None:
        return np.asarray(values != 0)
    magnitude = unsigned((1 << (8 * values.dtype.itemsize - 1)) - 1)
    bits = np.ascontiguousarray(values).reshape(-1).view(unsigned)
    nonzero = np.empty(bits.size, np.bool_)
    for start in range(0, bits.size, _CHUNK_ELEMENTS):
        piece = slice(start, start + _CHUNK_ELEMENTS)
        np.not_equal(bits[piece] & magnitude, 0, out=nonzero[piece])
    return nonzero.reshape(values.shape)


def write_masks(path: Path, masks: Mapping[str, BoolArray | PackedMask]) -> None:
    """Write masks, by full parameter name, to ``path``. Equal masks give equal bytes."""
    packed = {name: mask if isinstance(mask, PackedMask) else pack_mask(mask) for name, mask in masks.items()}
    shapes = {name: list(packed[name].shape) for name in sorted(packed)}
    save_file({name: packed[name].bits for name in shapes}, path, metadata={"shapes": json.dumps(shapes)})


class MaskFile(Mapping[str, BoolArray]):
    """The masks of a file by full parameter name; each is read and unpacked when asked for."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self.shapes = dict(shapes)

    def packed(self, name: str) -> PackedMask:
        """The mask of one parameter at one bit per weight."""
        shape = self.shapes[name]
        with safe_open(self.path, framework="numpy") as stored:
            return PackedMask(stored.get_tensor(name), shape)

    def __getitem__(self, name: str) -> BoolArray:
        return self.packed(name).unpack()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_masks(path: Path) -> MaskFile:
    """The masks in ``path``, checked for form, read one at a time when asked for.

    Raises:
        ExportError: E-MASKS-UNREADABLE: the file is missing, damaged, or is not a masks file.
    """
    if not os.path.isfile(path):  # a named pipe would wait for a writer
        raise _unreadable(path, "no regular file is there")
    try:
        with safe_open(path, framework="numpy") as stored:
            header = json.loads((stored.metadata() or {})["shapes"])
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118  (no mapping)
            lengths = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(header, dict) or header.keys() != lengths.keys():
        raise _unreadable(path, "the shapes in its header do not name its tensors")
    for name, shape in header.items():
        if not (isinstance(shape, list) and all(isinstance(side, int) and side >= 0 for side in shape)):
            raise _unreadable(path, f"the shape of {name} is {shape!r}")
        if lengths[name] != ("U8", [-(-math.prod(shape) // 8)]):
            raise _unreadable(path, f"the bits of {name} do not fit its shape {shape}")
    return MaskFile(Path(path), {name: tuple(shape) for name, shape in header.items()})


def _unreadable(path: Path, reason: str) -> ExportError:
    return ExportError(
        "E-MASKS-UNREADABLE",
        f"{path}: not a readable masks file: {reason}",
        "restore the file from the run that made it, or validate without masks",
    )
