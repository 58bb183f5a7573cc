"""Whether the files are those that the export wrote, before and after they are examined."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from exporters.fragments import dtype_name
from exporters.manifest import Manifest, check_files, read_manifest
from exporters.stored import StoredTensor
from validators.checks import Check, skipped
from validators.errors import ValidationError
from validators.request import ValidationRequest

Stamp = tuple[int, int, int]  # size, modification time in ns, inode


@dataclass(frozen=True)
class WatchedFiles:
    """The files of the model with their stamps when the examination began."""

    stamps: Mapping[Path, Stamp]


def watch(paths: Iterable[Path], earlier: WatchedFiles | None = None) -> WatchedFiles:
    """The files as they are now, those watched ``earlier`` as they were then; absent ones left out."""
    stamps = {path: stamp for path in paths if (stamp := _stamp(path)) is not None}
    return WatchedFiles({**stamps, **(earlier.stamps if earlier else {})})


def check_unchanged(watched: WatchedFiles) -> None:
    """Refuse files that were replaced or written while they were examined.

    Raises:
        ValidationError: E-VALIDATE-CHANGED.
    """
    for path, before in watched.stamps.items():
        if _stamp(path) != before:
            raise ValidationError(
                "E-VALIDATE-CHANGED",
                f"{path.name}: the file was changed while it was validated",
                "validate again when nothing writes to the folder",
            )


def check_manifest(request: ValidationRequest) -> tuple[Manifest | None, Check]:
    """The manifest, if one was given, with every file's hash found right.

    Raises:
        ValidationError: E-MANIFEST-MISMATCH: a file is missing or altered, or the manifest is of another model.
        ExportError: The manifest itself is missing, unreadable or altered.
    """
    if request.manifest_path is None:
        return None, skipped("manifest", "the model came without a manifest")
    path, model_path = Path(request.manifest_path), Path(request.model_path)
    manifest = read_manifest(path)
    listed = {os.path.realpath(path.parent / row.name) for row in manifest.files}
    if os.path.realpath(model_path) not in listed:
        raise manifest_mismatch(f"{model_path.name}: {path.name} is the manifest of another model")
    problems = check_files(manifest, path.parent)
    if problems:
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise manifest_mismatch(f"{problems[0].message}{more}")
    size_bytes = sum(row.size_bytes for row in manifest.files)
    why = f"{len(manifest.files)} files of {size_bytes} bytes, digest {manifest.digest[:16]}"
    return manifest, Check("manifest", "passed", 0, 0, "altered files", why)


def check_contents(manifest: Manifest, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a model with a data file that has no hash, and a manifest with a row that is no tensor of it.

    Args:
        manifest: Its file names are relative to ``folder``.
        folder: Where the manifest lies.
        tensors: The model's constants by name.

    Raises:
        ValidationError: E-MANIFEST-MISMATCH, naming the file or the tensor.
    """
    hashed = {os.path.realpath(folder / row.name) for row in manifest.files}
    for data_file in {path for tensor in tensors.values() for path in tensor.data_files}:
        if os.path.realpath(data_file) not in hashed:
            raise manifest_mismatch(f"{data_file.name}: holds weights, but the manifest has no hash of it")
    for row in manifest.tensors:
        tensor = tensors.get(row.name)
        if tensor is None:
            raise manifest_mismatch(f"{row.name}: in the manifest, but not in the model")
        said = (row.shape, row.dtype, row.encoding)
        found = (tensor.shape, dtype_name(tensor.dtype), tensor.encoding)
        if said != found:
            raise manifest_mismatch(
                f"{row.name}: the manifest says {_brief(said)}, the file has {_brief(found)}"
            )


def manifest_mismatch(message: str) -> ValidationError:
    """The error for files that are not what their manifest says."""
    return ValidationError(
        "E-MANIFEST-MISMATCH", message, "copy the files again from the run that made them, or export again"
    )


def _brief(parts: tuple[tuple[int, ...], str, str]) -> str:
    shape, dtype, encoding = parts
    return f"{dtype}{list(shape)} {encoding}"


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
