"""``compress validate``: text, report and exit codes, with a validator that finds what the test wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import Terminal
from report_samples import sample_report

from compressor import validation
from compressor.recipe import EvaluationRecipe
from compressor.run.output import name_output
from compressor.validation import ValidationOutcome
from validators.checks import CHECK_NAMES, Check, ValidationReport, skipped
from validators.errors import ValidationError

Call = dict[str, Any]


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs command lines."""
    return Terminal(capsys)


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    """A file to judge."""
    path = tmp_path / "sparse.onnx"
    path.write_bytes(b"0123456789")
    return path


def found(*, failed: bool = False) -> ValidationReport:
    """Three checks and the perplexities."""
    parity = Check(
        "parity-prefill",
        "failed" if failed else "passed",
        0.3 if failed else 1e-6,
        1e-4,
        "max |Δlogit|",
        "on 64 tokens",
    )
    return ValidationReport(
        checks=(Check("manifest", "passed"), skipped("pattern", "no N:M pattern"), parity),
        perplexity={"dense": None, "pruned": None, "recovered": 12.84, "onnx": 12.85},
        provider="CPUExecutionProvider",
        first_divergence="block 11: max |Δ| 0.9; blocks 0-10 within 2e-5" if failed else None,
        notices=("both wheels are installed",),
    )


@pytest.fixture
def validator(monkeypatch: pytest.MonkeyPatch) -> Callable[[ValidationReport | Exception], list[Call]]:
    """Puts a finding in the validator's place; returns the list of calls that it gets."""

    def install(finding: ValidationReport | Exception) -> list[Call]:
        calls: list[Call] = []

        def validate_export(path: str, **options: Any) -> ValidationOutcome:
            calls.append({"path": path, **options})
            if isinstance(finding, Exception):
                raise finding
            return ValidationOutcome(finding, name_output(path), None, None, None, ("python-docs is used",))

        monkeypatch.setattr(validation, "validate_export", validate_export)
        return calls

    return install


def test_cli_validate_prints_a_table_of_checks(terminal: Terminal, validator: Any, onnx: Path) -> None:
    """Every check on a line of its own with what was measured, then the perplexities and the verdict."""
    validator(found())
    ended = terminal.run("validate", onnx)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[:3] == [
        "manifest             passed",
        "pattern              skipped  no N:M pattern",
        "parity-prefill       passed   1e−6 max |Δlogit|, limit 1e−4 · on 64 tokens",
    ]
    assert lines[-1] == f"PASSED  {onnx} · 2 checks passed · 1 skipped · ran on CPUExecutionProvider"
    assert ["recovered", "12.84"] in [line.split() for line in lines]
    assert "note           both wheels are installed" in ended.err


def test_cli_validate_failed_gate_exits_4_and_says_where(
    terminal: Terminal, validator: Any, onnx: Path
) -> None:
    """A failed check is a line in the table, and the first divergence is named."""
    validator(found(failed=True))
    ended = terminal.run("validate", onnx)
    assert ended.code == 4
    assert "parity-prefill       failed   0.3 max |Δlogit|, limit 1e−4 · on 64 tokens" in ended.out
    assert "diverges       block 11: max |Δ| 0.9; blocks 0-10 within 2e-5" in ended.out
    assert ended.out.splitlines()[-1].startswith("FAILED  ")


def test_cli_validate_quiet_shows_failures_and_verdict(
    terminal: Terminal, validator: Any, onnx: Path
) -> None:
    """With -q what passed is not listed."""
    validator(found(failed=True))
    ended = terminal.run("validate", onnx, "-q")
    assert [line.split()[0] for line in ended.out.splitlines()] == ["parity-prefill", "FAILED"]
    assert ended.err == ""


def test_cli_validate_broken_file_exits_3(terminal: Terminal, validator: Any, onnx: Path) -> None:
    """A file that cannot be judged is an error, not a failed gate."""
    validator(ValidationError("E-VALIDATE-CRASHED", "the child died", "look at the file"))
    ended = terminal.run("validate", onnx, "-q")
    assert (ended.code, ended.out) == (3, "")
    assert ended.err.splitlines() == ["E-VALIDATE-CRASHED  the child died", "  do this: look at the file"]


def test_cli_validate_passes_its_options_on(terminal: Terminal, validator: Any, onnx: Path) -> None:
    """Text, gates and the rest reach the validator; without --eval-data the text is left to it."""
    calls = validator(found())
    arguments = (
        "--reference r --dense d --eval_data t.txt --split test --max-eval-windows 2 --max-ppl-increase 15%"
    )
    more = "--structure-only --provider cuda --require masks --trust-remote-code"
    more += " --lm-eval --tasks one,two --tasks-folder f --tasks-limit 5"
    assert terminal.run("validate", onnx, *arguments.split(), *more.split()).code == 0
    evaluation = EvaluationRecipe(source="t.txt", split="test", max_windows=2)
    call = calls[0]
    del call["progress"]
    gates = call.pop("gates")
    assert gates.max_ppl_increase == 0.15
    assert call == {
        "path": str(onnx),
        "evaluation": evaluation,
        "reference": "r",
        "dense": "d",
        "structure_only": True,
        "provider": "cuda",
        "parity": "auto",
        "require": ("masks",),
        "trust_remote_code": True,
        "lm_eval": True,
        "tasks": ("one", "two"),
        "tasks_folder": "f",
        "tasks_limit": 5,
    }
    terminal.run("validate", onnx)
    assert calls[1]["evaluation"].model_fields_set == set()


def test_cli_validate_json_is_the_report_document(terminal: Terminal, validator: Any, onnx: Path) -> None:
    """The same schema as a run's report, with what a validation knows."""
    validator(found(failed=True))
    ended = terminal.run("validate", onnx, "--json", "-q")
    document = json.loads(ended.out)
    assert (ended.code, document["command"], document["validation"]["passed"]) == (4, "validate", False)
    assert [check["name"] for check in document["validation"]["checks"]] == [
        "manifest",
        "pattern",
        "parity-prefill",
    ]
    assert document["perplexity"]["onnx"] == 12.85
    assert document["size"]["onnx_bytes"] == 10
    assert document["notices"] == ["both wheels are installed", "python-docs is used"]


@pytest.mark.parametrize("name", ["v", "v.json", "v.html"])
def test_cli_validate_writes_a_report(
    terminal: Terminal, validator: Any, onnx: Path, tmp_path: Path, name: str
) -> None:
    """Both forms under one name, whichever ending was given, and nothing else."""
    (tmp_path / "there").mkdir()
    validator(found())
    ended = terminal.run("validate", onnx, "--report", tmp_path / "there" / name)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"v.json", "v.html"}
    assert json.loads((tmp_path / "there" / "v.json").read_text())["validation"]["passed"] is True
    assert ended.out.splitlines()[-1] == f"report         {tmp_path / 'there' / 'v.html'}"


def test_cli_validate_report_without_a_place_is_refused_first(
    terminal: Terminal, validator: Any, onnx: Path, tmp_path: Path
) -> None:
    """A missing folder is told before the work, not after it."""
    calls = validator(found())
    ended = terminal.run("validate", onnx, "--report", tmp_path / "no" / "v.json")
    assert (ended.code, calls) == (6, [])
    assert ended.err.startswith("E-OUTPUT-PARENT  ")


def test_cli_validate_report_keeps_what_the_run_knew(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, onnx: Path
) -> None:
    """Model and sparsity come from the run's report beside the file; the verdict does not."""
    recorded = sample_report(2)

    def validate_export(path: str, **_: Any) -> ValidationOutcome:
        return ValidationOutcome(found(failed=True), name_output(path), None, None, recorded, ())

    monkeypatch.setattr(validation, "validate_export", validate_export)
    document = json.loads(terminal.run("validate", onnx, "--json", "-q").out)
    assert document["model"]["name"] == "meta-llama/Llama-3.2-1B"
    assert document["sparsity"]["measured"] == 0.6
    assert document["validation"]["passed"] is False


def test_cli_validate_file_that_is_not_there(terminal: Terminal, tmp_path: Path) -> None:
    """The real validator refuses a path without a file, exit 3."""
    ended = terminal.run("validate", tmp_path / "no.onnx", "-q")
    assert ended.code == 3
    assert ended.err.startswith("E-ONNX-NOT-FOUND  ")


def test_cli_validate_unknown_check_lists_the_checks(terminal: Terminal, onnx: Path) -> None:
    """A name that is no check is a usage error with all names."""
    ended = terminal.run("validate", onnx, "--require", "parity", "-q")
    assert ended.code == 2
    assert all(name in ended.err for name in CHECK_NAMES)
