"""The manifest of an export: its files with their hashes, and one row per weight.

It goes beside the model, is named by its digest in the report, and is checked before anything else opens
the model: a mutated ONNX file often still loads and computes other numbers. It detects corruption, not an
attacker: nothing is signed. No times and no absolute paths stand in it, so equal runs give equal bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from exporters.errors import ExportError

SCHEMA = 1
_MAX_MANIFEST_BYTES = 256 * 2**20
_CHUNK_BYTES = 2**20

Encoding = Literal["dense", "sparse", "packed"]


@dataclass(frozen=True)
class TensorRow:
    """One weight of the exported graph.

    Attributes:
        name: Initializer name; equals the parameter's name in the state dict.
        shape: Shape as stored in the graph; of a packed one (outputs, inputs).
        dtype: Numpy's name of the stored type: float32, float16, bfloat16, int8, int4, …
        transposed: Whether the graph stores the parameter with its last two axes swapped.
        input_axis: Axis along which the linear's inputs run (-1 or -2); None where the graph does not tell.
        pruned: Whether pruning put its zeros there.
        nnz: Stored elements that are not zero.
        encoding: How it is stored.
        mask_sha256: Digest of the packed non-zero pattern (C order of ``shape``, see exporters.masks); None
            without zeros.
        bytes_by_encoding: Exact bytes in the files for ``dense``, ``sparse`` and ``packed`` (where it is), and for
            ``bitmask`` (one bit per weight and the non-zero values; for information). What is not possible is absent.
        stored_bytes: Bytes in the files for the encoding that was used.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    input_axis: int | None
    pruned: bool
    nnz: int
    encoding: Encoding
    mask_sha256: str | None
    bytes_by_encoding: dict[str, int]
    stored_bytes: int


@dataclass(frozen=True)
class FileRow:
    """One file: its path relative to the manifest (``/`` between folders), sha256 in hex, size."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class FileProblem:
    """A file that is not what the manifest says: its name, the error id, and what is wrong on one line."""

    file: str
    error_id: str
    message: str


@dataclass(frozen=True)
class Manifest:
    """What an export consists of.

    Attributes:
        files: Every model file, in the order given.
        tensors: One row per weight, in the graph's order.
        block_outputs: Name of each decoder block's output value in the graph, first block first.
        pattern: N:M pattern that the pruned weights hold ("2:4"), None for unstructured or no pruning.
        sparsity: Share of zeros that pruning aimed at; None where nothing was pruned.
        ignored: The ignore patterns: weights that match were left dense on purpose.
        schema: Version of this layout.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    files: tuple[FileRow, ...]
    tensors: tuple[TensorRow, ...]
    block_outputs: tuple[str, ...] = ()
    pattern: str | None = None
    sparsity: float | None = None
    ignored: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """Sha256 in hex of the manifest's content, in a canonical JSON form without this digest."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> tuple[FileRow, ...]:
    """Name, sha256 and size of each file of ``folder``; ``names`` are relative, with ``/`` between folders.

    Raises:
        ExportError: E-MANIFEST-FILE-*: a file is missing, not a regular file, or outside the folder.
    """
    rows = []
    for name in names:
        row = _hash_file(folder, name)
        if isinstance(row, FileProblem):
            raise ExportError(row.error_id, row.message, "make the export again")
        rows.append(row)
    return tuple(rows)


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest as JSON to ``path`` and flush it to the disk. Equal manifests give equal bytes."""
    content = {**dataclasses.asdict(manifest), "digest": manifest.digest}
    with path.open("w", encoding="utf-8", newline="\n") as out:
        json.dump(content, out, indent=1, sort_keys=True)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())


def read_manifest(path: Path) -> Manifest:
    """The manifest in ``path``, its own digest checked.

    Raises:
        ExportError: E-MANIFEST-MISSING, E-MANIFEST-UNREADABLE (no manifest in form), E-MANIFEST-SCHEMA
            (another version), E-MANIFEST-DIGEST (altered after it was written).
    """
    content = _read_json(path)
    if content.get("schema") != SCHEMA:
        raise ExportError(
            "E-MANIFEST-SCHEMA",
            f"{path}: manifest schema {content.get('schema')!r}, this version reads {SCHEMA}",
            "validate with the version that made the export, or export again",
        )
    digest = content.pop("digest", None)
    try:
        manifest = TypeAdapter(Manifest).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _unreadable(path, f"{where}: {first['msg']}") from error
    if digest != manifest.digest:
        raise ExportError(
            "E-MANIFEST-DIGEST",
            f"{path}: the manifest was altered: its digest is {manifest.digest}, it says {digest}",
            "restore the manifest from the run that made it, or export again",
        )
    return manifest


def check_files(manifest: Manifest, folder: Path) -> list[FileProblem]:
    """What differs between the manifest and the files of ``folder``; empty when every file is unchanged.

    Hashes every file, so it takes as long as reading the model once.
    """
    problems = []
    for expected in manifest.files:
        found = _hash_file(folder, expected.name, expected.size_bytes)
        if isinstance(found, FileProblem):
            problems.append(found)
        elif found.sha256 != expected.sha256:
            hashes = f"{found.sha256[:16]}…, the manifest says {expected.sha256[:16]}…"
            message = f"{expected.name}: altered: sha256 {hashes}"
            problems.append(FileProblem(expected.name, "E-MANIFEST-FILE-ALTERED", message))
    return problems


def _hash_file(folder: Path, name: str, expected_bytes: int | None = None) -> FileRow | FileProblem:
    """The file's row, or why there is none; a size other than ``expected_bytes`` spares the reading."""
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts or any(sign in name for sign in "\\:\0"):
        message = f"{name!r}: a file name must be relative and inside the folder"
        return FileProblem(name, "E-MANIFEST-FILE-UNSAFE", message)
    path = folder.joinpath(*relative.parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        return FileProblem(name, "E-MANIFEST-FILE-UNSAFE", f"{name}: a link that leads out of {folder}")
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        return FileProblem(name, "E-MANIFEST-FILE-MISSING", f"{name}: {error.strerror or error} in {folder}")
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            return FileProblem(name, "E-MANIFEST-FILE-UNSAFE", f"{name}: not a regular file")
        if expected_bytes is not None and status.st_size != expected_bytes:
            message = f"{name}: altered: {status.st_size} bytes, the manifest says {expected_bytes}"
            return FileProblem(name, "E-MANIFEST-FILE-ALTERED", message)
        sha256, size_bytes = _hash_stream(stream)
    return FileRow(name, sha256, size_bytes)


def _hash_stream(stream: BinaryIO) -> tuple[str, int]:
    """Sha256 in hex and number of bytes of what is left in ``stream``."""
    digest, size_bytes = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
        size_bytes += len(chunk)
    return digest.hexdigest(), size_bytes


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``."""
    try:
        if not path.is_file():
            raise ExportError(
                "E-MANIFEST-MISSING",
                f"{path}: no manifest there",
                "keep the .manifest.json beside the model, or export again",
            )
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise _unreadable(path, f"larger than {_MAX_MANIFEST_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(content, dict):
        raise _unreadable(path, "not a JSON object")
    return content


def _unreadable(path: Path, reason: str) -> ExportError:
    return ExportError(
        "E-MANIFEST-UNREADABLE",
        f"{path}: not a readable manifest: {reason}",
        "restore the manifest from the run that made it, or export again",
    )
