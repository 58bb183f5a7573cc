"""Which safetensors files a model folder has, and whether they are whole; no weight is read.

Source of the format: https://github.com/huggingface/safetensors#format: eight bytes little endian with the
length of the header, a JSON header, the tensors one after the other with no holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import InputRefused
from compressor.models.config_file import read_json_object
from compressor.models.folder_files import is_plain_name

__all__ = [
    "PICKLE_SUFFIXES",
    "StoredTensor",
    "WeightFiles",
    "find_weight_files",
    "pickle_refused",
    "read_header",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the format

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64":
    64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: its dtype by the format's name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model folder.

    Attributes:
        paths: The files, in the order of their names.
        tensors: What they hold, by the name in the file.
        where: The file that holds each of them.
    """

    paths: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    where: Mapping[str, Path]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(path.stat().st_size for path in self.paths)


def find_weight_files(folder: Path, model: str) -> WeightFiles:
    """The weights that transformers would load from ``folder``, their headers checked.

    Args:
        folder: The model's folder.
        model: What errors call it.

    Raises:
        InputRefused: E-MODEL-PICKLE: only pickles; E-MODEL-NOT-FOUND: no weights; E-WEIGHTS-INDEX: the index
            names no
            files of the folder; E-WEIGHTS-SHARD-MISSING; E-WEIGHTS-TRUNCATED; E-WEIGHTS-HEADER: not
            safetensors, or its header contradicts itself; E-WEIGHTS-DUPLICATE: a tensor stands twice.
    """
    if (folder / SINGLE).is_file():
        tensors = read_header(folder / SINGLE)
        return WeightFiles((folder / SINGLE,), tensors, dict.fromkeys(tensors, folder / SINGLE))
    if not (folder / INDEX).is_file():
        raise _no_weights(folder, model)
    weight_map = _read_weight_map(folder / INDEX)
    paths = tuple(folder / name for name in sorted(set(weight_map.values())))
    for path in paths:
        if not path.is_file():
            raise InputRefused(
                "E-WEIGHTS-SHARD-MISSING",
                f"{INDEX} names {path.name}, which is not in the folder",
                "fetch the model again",
            )
    tensors = {}
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise InputRefused(
                    "E-WEIGHTS-DUPLICATE",
                    f"{name} stands in {path.name} and in a shard before it",
                    "fetch the model again",
                )
            if weight_map.get(name) == path.name:
                tensors[name] = tensor
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise InputRefused(
            "E-WEIGHTS-INDEX",
            f"{weight_map[absent[0]]} lacks {absent[0]}, which {INDEX} places there",
            "fetch the model again",
        )
    return WeightFiles(paths, tensors, {name: folder / weight_map[name] for name in tensors})


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file holds, its header checked against the format and the file's size.

    Raises:
        InputRefused: E-WEIGHTS-TRUNCATED, E-WEIGHTS-HEADER, E-WEIGHTS-DUPLICATE, E-WEIGHTS-UNREADABLE.
    """
    size, text = _header_text(path)
    header = _parse_header(path, text)
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name], span = _checked_entry(path, name, entry)
            spans.append((*span, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _bad_header(path, f"{name} begins at byte {begin} instead of {position}")
        position = end
    stored = size - 8 - len(text)
    if stored < position:
        raise _truncated(path, f"its tensors need {position} bytes, {stored} are there")
    if stored > position:
        raise _bad_header(path, f"{stored - position} bytes at its end belong to no tensor")
    return tensors


def _header_text(path: Path) -> tuple[int, bytes]:
    """Size of the file, and its header as it stands."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) == 8 and length > MAX_HEADER_BYTES:
                raise _bad_header(path, f"its header would have {length} bytes")
            if len(prefix) < 8 or 8 + length > size:
                raise _truncated(path, f"{size} bytes end within its header")
            return size, stream.read(length)
    except OSError as error:
        raise InputRefused(
            "E-WEIGHTS-UNREADABLE",
            f"{path.name} cannot be read: {error.strerror}",
            "check the file and its rights",
        ) from None


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise InputRefused(
                    "E-WEIGHTS-DUPLICATE",
                    f"{path.name} names {key} twice in its header",
                    "fetch the file again",
                )
            seen[key] = value
        return seen

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise _bad_header(path, "its header is no JSON") from None
    if not isinstance(header, dict):
        raise _bad_header(path, "its header is no JSON object")
    return header


def _checked_entry(path: Path, name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    """The tensor that a header entry describes, and its first and one-past-last byte."""
    fields = entry if isinstance(entry, dict) else {}
    dtype = fields.get("dtype")
    shape, offsets = _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _bad_header(path, f"{name} has the unknown dtype {str(dtype)[:40]!r}")
    if shape is None or offsets is None or len(offsets) != 2:
        raise _bad_header(path, f"{name} has no valid shape and data_offsets")
    begin, end = offsets
    tensor = StoredTensor(dtype, shape)
    if (end - begin) * 8 != tensor.numel * _BITS[dtype]:
        raise _bad_header(path, f"{name} of shape {shape} and {dtype} does not fill bytes {begin} to {end}")
    return tensor, (begin, end)


def _counts(value: Any) -> tuple[int, ...] | None:
    """The list as a tuple where it holds nothing but counts."""
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value):
        return tuple(value)
    return None


def _read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name to file name of an index; the files are names in the same folder, nothing else."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputRefused("E-WEIGHTS-INDEX", f"{path.name} has no weight_map", "fetch the model again")
    for name, shard in weight_map.items():
        if not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise InputRefused(
                "E-WEIGHTS-INDEX",
                f"{path.name} places {name} in {str(shard)[:80]!r}, which is no safetensors file beside it",
                "fetch the model again",
            )
    return weight_map


def _no_weights(folder: Path, model: str) -> InputRefused:
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return pickle_refused(model, pickles[0])
    return InputRefused(
        "E-MODEL-NOT-FOUND",
        f"{model} has neither {SINGLE} nor {INDEX}",
        "give the folder that save_pretrained wrote, or a hub id",
    )


def pickle_refused(model: str, pickle: str) -> InputRefused:
    """The refusal of a model that has its weights as pickles only."""
    return InputRefused(
        "E-MODEL-PICKLE",
        f"{model} has its weights as a pickle only ({pickle}), which can run code when it is read",
        "where you trust it, load it once with AutoModelForCausalLM.from_pretrained and save it again with "
        "save_pretrained, which writes safetensors",
    )


def _truncated(path: Path, what: str) -> InputRefused:
    return InputRefused("E-WEIGHTS-TRUNCATED", f"{path.name} is cut short: {what}", "fetch the file again")


def _bad_header(path: Path, what: str) -> InputRefused:
    return InputRefused(
        "E-WEIGHTS-HEADER", f"{path.name} is no valid safetensors file: {what}", "fetch the file again"
    )
