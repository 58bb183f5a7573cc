"""The manifest: it comes back as it was, and any change to it or to a file is seen."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_samples import pruned_matrix, weight_of, write_product

from exporters.errors import ExportError
from exporters.manifest import FileRow, Manifest, check_files, hash_files, read_manifest, write_manifest

FILES = ("model.onnx", "model.onnx.data", "hf/config.json")


@pytest.fixture
def export(tmp_path: Path) -> tuple[Path, Manifest]:
    """A folder with a small export, and its manifest."""
    _, rows = write_product(tmp_path, [weight_of(f"w{i}", pruned_matrix((24, 24), 0.8, i)) for i in range(2)])
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    manifest = Manifest(hash_files(tmp_path, FILES), rows, ("block.0",), "2:4", 0.5, ("lm_head",))
    write_manifest(manifest, tmp_path / "model.manifest.json")
    return tmp_path, manifest


def refusal(path: Path) -> str:
    """The id with which the manifest is refused."""
    with pytest.raises(ExportError) as refused:
        read_manifest(path)
    return refused.value.error_id


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of the manifest's file, its digest left as it was."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_manifest_survives_the_file(export: tuple[Path, Manifest]) -> None:
    """What is read equals what was written, digest included."""
    folder, manifest = export
    found = read_manifest(folder / "model.manifest.json")
    assert found == manifest
    assert found.digest == manifest.digest


def test_equal_manifests_give_equal_bytes(export: tuple[Path, Manifest]) -> None:
    """No time, no absolute path: the same export has the same manifest."""
    folder, manifest = export
    write_manifest(dataclasses.replace(manifest), folder / "again.json")
    assert (folder / "again.json").read_bytes() == (folder / "model.manifest.json").read_bytes()
    assert str(folder) not in (folder / "again.json").read_text()


@pytest.mark.parametrize(
    "changes",
    [{"pattern": "1:4"}, {"sparsity": 0.9}, {"tensors": []}, {"digest": "0" * 64}, {"digest": None}],
    ids=str,
)
def test_altered_manifest_is_refused(export: tuple[Path, Manifest], changes: dict[str, Any]) -> None:
    """A field that was changed after writing no longer fits the manifest's own digest."""
    path = export[0] / "model.manifest.json"
    rewrite(path, **changes)
    assert refusal(path) == "E-MANIFEST-DIGEST"


@pytest.mark.parametrize(
    "changes", [{"unknown": 1}, {"files": "none"}, {"tensors": [{"name": "w"}]}], ids=str
)
def test_manifest_of_another_form_is_refused(export: tuple[Path, Manifest], changes: dict[str, Any]) -> None:
    """Unknown, missing or mistyped fields are refused, and the message names the field."""
    path = export[0] / "model.manifest.json"
    rewrite(path, **changes)
    with pytest.raises(ExportError, match=next(iter(changes))) as refused:
        read_manifest(path)
    assert refused.value.error_id == "E-MANIFEST-UNREADABLE"


def test_manifest_of_another_schema_is_refused(export: tuple[Path, Manifest]) -> None:
    """A manifest of a later version is named as such."""
    path = export[0] / "model.manifest.json"
    rewrite(path, schema=2)
    assert refusal(path) == "E-MANIFEST-SCHEMA"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000], ids=lambda content: content[:4]
)
def test_manifest_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    """Damaged text gives the manifest's error, whatever it is."""
    (tmp_path / "m.json").write_bytes(content)
    assert refusal(tmp_path / "m.json") == "E-MANIFEST-UNREADABLE"


def test_absent_manifest_has_an_id_of_its_own(tmp_path: Path) -> None:
    """No file, or a folder in its place, is a missing manifest."""
    assert refusal(tmp_path / "m.json") == "E-MANIFEST-MISSING"
    assert refusal(tmp_path) == "E-MANIFEST-MISSING"


def test_untouched_files_have_no_problem(export: tuple[Path, Manifest]) -> None:
    """Right after the export nothing differs."""
    folder, manifest = export
    assert check_files(manifest, folder) == []


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_found(export: tuple[Path, Manifest], name: str) -> None:
    """Changing any one of a hundred bytes of any file is found, and no other file is blamed."""
    folder, manifest = export
    good = (folder / name).read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(good), 100):
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(bad)
        (problem,) = check_files(manifest, folder)
        assert (problem.file, problem.error_id) == (name, "E-MANIFEST-FILE-ALTERED")


def test_shorter_longer_and_missing_files_are_found(export: tuple[Path, Manifest]) -> None:
    """A cut file, one with a tail, and an absent one are each named with what is wrong."""
    folder, manifest = export
    (folder / FILES[0]).write_bytes((folder / FILES[0]).read_bytes()[:-1])
    (folder / FILES[1]).write_bytes((folder / FILES[1]).read_bytes() + b"\0")
    (folder / FILES[2]).unlink()
    found = [(problem.file, problem.error_id) for problem in check_files(manifest, folder)]
    assert found == [
        (FILES[0], "E-MANIFEST-FILE-ALTERED"),
        (FILES[1], "E-MANIFEST-FILE-ALTERED"),
        (FILES[2], "E-MANIFEST-FILE-MISSING"),
    ]


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "hf/../../outside", "", "C:\\x", "a\0b"])
def test_names_that_leave_the_folder_are_not_opened(tmp_path: Path, name: str) -> None:
    """A manifest cannot point the check at files elsewhere."""
    (tmp_path / "outside").write_text("x")
    (tmp_path / "folder").mkdir()
    manifest = Manifest((FileRow(name, "0" * 64, 1),), ())
    (problem,) = check_files(manifest, tmp_path / "folder")
    assert problem.error_id == "E-MANIFEST-FILE-UNSAFE"


def test_links_out_and_pipes_are_not_read(tmp_path: Path) -> None:
    """A symbolic link that leads out and a named pipe are refused without waiting."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_text("x")
    (folder / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe")
    manifest = Manifest((FileRow("link", "0" * 64, 1), FileRow("pipe", "0" * 64, 0)), ())
    assert [problem.error_id for problem in check_files(manifest, folder)] == ["E-MANIFEST-FILE-UNSAFE"] * 2


def test_hashing_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A manifest is never made with a file missing."""
    with pytest.raises(ExportError) as refused:
        hash_files(tmp_path, ["model.onnx"])
    assert refused.value.error_id == "E-MANIFEST-FILE-MISSING"
