"""External data of an ONNX file, found and read without trusting the file.

A model may name any path as the place of its weights. Allowed is a regular file inside the model's folder;
not allowed is an absolute path, ``..``, a symbolic link that leads out, or a file with a second hard link,
which may lie anywhere. Offset and length must lie within the file. Nothing is allocated before that is known.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray

from exporters.errors import ExportError
from exporters.protobuf import text


@dataclass(frozen=True)
class ExternalSpan:
    """Where a tensor's values lie: ``size_bytes`` bytes from ``offset`` of the file ``path``."""

    tensor: str
    path: Path
    offset: int
    size_bytes: int

    def read(self) -> NDArray[np.uint8]:
        """The bytes.

        Raises:
            ExportError: E-ONNX-DATA-*: the file is no longer as it was when the span was made.
        """
        octets = np.empty(self.size_bytes, np.uint8)
        with open_regular(self.path, self.tensor) as stream:
            stream.seek(self.offset)
            if stream.readinto(octets.data) != self.size_bytes:  # type: ignore[attr-defined]  # FileIO has it
                raise _truncated(self.tensor, self.path, self.offset, self.size_bytes, stream.tell())
        return octets


def locate(name: str, tensor: onnx.TensorProto, folder: Path, size_bytes: int) -> ExternalSpan:
    """Where the ``size_bytes`` bytes of an external tensor lie, checked against the folder and the file.

    Raises:
        ExportError: E-ONNX-DATA-ESCAPES (a path or link out of ``folder``), E-ONNX-DATA-MISSING,
            E-ONNX-DATA-TRUNCATED (the file ends too early), E-ONNX-DATA-MALFORMED (entries without sense).
        ValueError: An entry is not UTF-8.
    """
    entries = {text(entry.key): text(entry.value) for entry in tensor.external_data}
    path = _contained(name, entries.get("location", ""), folder)
    offset = _decimal(name, entries, "offset", 0)
    length = _decimal(name, entries, "length", size_bytes)
    if length != size_bytes:
        raise _malformed(name, f"length {length}, its shape and type need {size_bytes} bytes")
    with open_regular(path, name) as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
    if offset + size_bytes > file_bytes:
        raise _truncated(name, path, offset, size_bytes, file_bytes)
    return ExternalSpan(name, path, offset, size_bytes)


def open_regular(path: Path, tensor: str) -> BinaryIO:
    """The file opened for reading, unbuffered, if it is a regular file with one name.

    Raises:
        ExportError: E-ONNX-DATA-MISSING or E-ONNX-DATA-ESCAPES, naming ``tensor``.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ExportError(
            "E-ONNX-DATA-MISSING",
            f"{tensor}: its data file {path} cannot be read: {error.strerror or error}",
            "put the data file beside the .onnx file under the name that it was written with",
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        what = "has a second hard link" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        raise _escapes(tensor, f"{path} {what}")
    return os.fdopen(descriptor, "rb", buffering=0)


def _contained(tensor: str, location: str, folder: Path) -> Path:
    """The path of ``location`` if it lies in ``folder``."""
    relative = PurePosixPath(location)
    parts = location.replace("\\", "/").split("/")
    if not location or relative.is_absolute() or ".." in parts or any(sign in location for sign in "\\:\0"):
        raise _escapes(tensor, f"{location!r} is no relative path inside the folder")
    path = folder.joinpath(*relative.parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise _escapes(tensor, f"{path} is a link that leads out of {folder}")
    return path


def _decimal(tensor: str, entries: Mapping[str, str], key: str, default: int) -> int:
    """The entry ``key`` as a number that is not negative."""
    text = entries.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise _malformed(tensor, f"{key} {text[:40]!r}")
    return int(text)


def _escapes(tensor: str, reason: str) -> ExportError:
    return ExportError(
        "E-ONNX-DATA-ESCAPES",
        f"{tensor}: its external data is not a file of the model's folder: {reason}",
        "copy the model and its data as plain files into one folder, if you trust where they come from",
    )


def _malformed(tensor: str, reason: str) -> ExportError:
    return ExportError(
        "E-ONNX-DATA-MALFORMED", f"{tensor}: external data entry: {reason}", "export the model again"
    )


def _truncated(tensor: str, path: Path, offset: int, size_bytes: int, file_bytes: int) -> ExportError:
    return ExportError(
        "E-ONNX-DATA-TRUNCATED",
        f"{tensor}: needs bytes {offset} to {offset + size_bytes} of {path}, which has {file_bytes}",
        "copy the data file again, or export the model again",
    )
