"""The child process: every way in which it can end, and that it never outlives its parent."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from toy_language_model import ToyExport, write_export

from exporters.errors import ReportedError
from validators.checks import Gates
from validators.events import ValidationProgress
from validators.request import ValidationRequest
from validators.validate import available_memory_bytes, validate


@pytest.fixture
def export(tmp_path: Path) -> ToyExport:
    """A good export."""
    return write_export(tmp_path / "toy")


def factory(export: ToyExport, name: str, **limits: object) -> ValidationRequest:
    """The request with another reference factory of the toy module, and parity alone, which needs no torch."""
    changes = {
        "reference_factory": f"toy_language_model:{name}",
        "reference_arguments": {},
        "parity_ids_path": export.request.windows_path,
        "windows_path": None,
        **limits,
    }
    return dataclasses.replace(export.request, **changes)  # type: ignore[arg-type]


def refusal_of(request: ValidationRequest) -> ReportedError:
    """The error with which validation ends; no child is left behind."""
    with pytest.raises(ReportedError) as caught:
        validate(request)
    assert not psutil.Process().children(recursive=True)
    return caught.value


def test_child_gives_the_report_from_any_folder(
    export: ToyExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report comes through from a folder with hostile module names, and with relative paths."""
    for name in ("validators", "onnx", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    seen: list[ValidationProgress] = []
    relative = {
        name: os.path.relpath(str(getattr(export.request, name)), tmp_path)
        for name in ("model_path", "manifest_path", "masks_path", "windows_path")
    }
    report = validate(dataclasses.replace(export.request, **relative), seen.append)  # type: ignore[arg-type]
    assert report.passed
    assert ValidationProgress("parity", 3, 3) in seen
    assert not psutil.Process().children(recursive=True)


def test_request_survives_json() -> None:
    """A request comes back from JSON as it was."""
    request = ValidationRequest("m.onnx", gates=Gates(min_sparsity=0.5), require=("masks",))
    assert ValidationRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_refusal_in_the_child_keeps_id_and_exit_code(export: ToyExport) -> None:
    """An error that the examination raises arrives as the same error."""
    with (export.folder / "toy.onnx.data").open("ab") as data:
        data.write(b"\0")
    error = refusal_of(export.request)
    assert (error.error_id, error.exit_code) == ("E-MANIFEST-MISMATCH", 3)
    assert "toy.onnx.data" in error.message
    assert error.remedy


def test_crash_in_native_code_is_an_error_of_the_input(export: ToyExport) -> None:
    """A segmentation fault ends the child alone; the error names the file, the stage and the signal."""
    error = refusal_of(factory(export, "crash"))
    assert (error.error_id, error.exit_code) == ("E-VALIDATE-CRASHED", 3)
    assert all(part in error.message for part in ("toy.onnx", "reference", "SIGSEGV"))


def test_child_killed_from_outside_counts_as_out_of_memory(export: ToyExport) -> None:
    """A SIGKILL that we did not send is the system's, for want of memory."""
    error = refusal_of(factory(export, "kill"))
    assert (error.error_id, error.exit_code) == ("E-VALIDATE-MEMORY", 5)


def test_child_beyond_its_memory_limit_is_ended(export: ToyExport) -> None:
    """A child that takes more than the limit is ended, and the error says how much it had."""
    error = refusal_of(factory(export, "fill_memory", memory_limit_bytes=2**30))
    assert (error.error_id, error.exit_code) == ("E-VALIDATE-MEMORY", 5)
    assert "1024 MiB allowed" in error.message


def test_failed_allocation_counts_as_out_of_memory(export: ToyExport) -> None:
    """numpy's own refusal to allocate is the same error."""
    error = refusal_of(factory(export, "ask_too_much"))
    assert (error.error_id, error.exit_code) == ("E-VALIDATE-MEMORY", 5)


def test_child_beyond_its_time_is_ended(export: ToyExport) -> None:
    """A child that hangs is ended, with what it started."""
    error = refusal_of(factory(export, "hang_with_children", time_limit_s=10))
    assert (error.error_id, error.exit_code) == ("E-VALIDATE-TIMEOUT", 5)
    assert "10 s" in error.message


def test_bug_in_the_child_is_ours_and_keeps_its_traceback(export: ToyExport) -> None:
    """An exception that nobody foresaw has exit code 1, a short message, and the traceback as its cause."""
    error = refusal_of(factory(export, "stumble"))
    assert (error.error_id, error.exit_code) == ("E-VALIDATE-BROKEN", 1)
    assert "\n" not in error.message
    assert "ZeroDivisionError" in str(error.__cause__)


def test_interrupt_in_the_parent_ends_the_child(export: ToyExport) -> None:
    """Ctrl-C while the child works leaves no process and no folder behind."""

    def interrupt(progress: ValidationProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(factory(export, "sleep"), interrupt)
    assert not psutil.Process().children(recursive=True)


def test_child_ends_when_its_parent_is_gone(export: ToyExport, tmp_path: Path) -> None:
    """A parent killed without a chance to tidy up takes its child along: standard input ends."""
    request = tmp_path / "request.json"
    content = {
        "request": factory(export, "sleep").to_json(),
        "sys_path": [os.path.abspath(entry) for entry in sys.path],
        "folder": str(tmp_path),
    }
    request.write_text(json.dumps(content))
    child = subprocess.Popen(
        [sys.executable, "-m", "validators.child", str(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(content["sys_path"])},
        text=True,
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert any('"reference"' in line for line in child.stdout)  # it sleeps now
        child.stdin.close()
        assert child.wait(60) == 143


@pytest.mark.parametrize(
    ("changes", "error_id"),
    [
        ({"manifest_path": None, "masks_path": None, "reference_factory": None}, "E-VALIDATE-NOTHING"),
        ({"require": ("parity", "masks")}, "E-CHECK-NAME"),
        ({"pattern": "half"}, "E-VALIDATE-PATTERN"),
    ],
)
def test_requests_without_sense_start_no_child(
    export: ToyExport, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], error_id: str
) -> None:
    """Nothing to compare with, unknown checks and patterns are usage errors before any work."""
    monkeypatch.setattr(subprocess, "Popen", None)
    error = refusal_of(dataclasses.replace(export.request, **changes))  # type: ignore[arg-type]
    assert (error.error_id, error.exit_code) == (error_id, 2)


def test_structure_alone_needs_nothing_to_compare_with(export: ToyExport) -> None:
    """The bare file is judged by itself when asked for."""
    bare = {"manifest_path": None, "masks_path": None, "reference_factory": None, "structure_only": True}
    report = validate(dataclasses.replace(export.request, **bare))  # type: ignore[arg-type]
    assert report.passed
    assert report.check("manifest").status == "skipped"


def test_available_memory_respects_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tighter of machine and control group counts, and a group without a limit counts nothing."""
    monkeypatch.setattr("validators.validate._CGROUP", tmp_path)
    machine = available_memory_bytes()
    assert machine > 0
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("1500\n")
    assert available_memory_bytes() == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert np.isclose(available_memory_bytes(), machine, rtol=0.5)  # others use the machine meanwhile
