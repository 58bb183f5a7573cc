"""Zero-shot tasks without lm-eval: refusals, options, and how results reach JSON, page and terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
from cli_fakes import Terminal
from report_samples import sample_report
from toy_language_model import write_export

from compressor.cli.tasks import task_table
from compressor.report.html import render_html
from compressor.report.schema import Report, TaskRow, TaskScore
from compressor.reporting import task_rows
from exporters.errors import ReportedError
from validators import harness
from validators.checks import Check, TaskResult, ValidationReport
from validators.request import TaskRequest, ValidationRequest
from validators.validate import check_request

ACCURACY = TaskResult("piqa", "acc", 0.7512, 0.0101, 1838, True)
PERPLEXITY = TaskResult("text", "word_perplexity", 12.345, None, 3, False)
ROW = TaskRow(
    task="piqa", metric="acc", documents=1838, higher_is_better=True,
    onnx=TaskScore(value=0.7512, stderr=0.0101), recovered=TaskScore(value=0.75, stderr=0.0102),
)  # fmt: skip
ALONE = TaskRow(
    task="text", metric="word_perplexity", documents=3, higher_is_better=False, onnx=TaskScore(value=12.345)
)


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs command lines."""
    return Terminal(capsys)


def with_tasks(folder: Path, **changes: object) -> ValidationRequest:
    """A request that names a task."""
    tasks = TaskRequest(("piqa",), "toy_language_model:load_reference", {}, 64)
    return dataclasses.replace(write_export(folder).request, tasks=tasks, **changes)  # type: ignore[arg-type]


def test_tasks_without_lm_eval_are_refused_first(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for and cannot be had is exit 5 with the way to install it, before any work."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    ended = terminal.run("validate", tmp_path / "no.onnx", "--tasks", "piqa", "-q")
    assert ended.code == 5
    assert ended.err.splitlines() == [
        "E-LM-EVAL-MISSING  tasks need lm-eval-harness, which is not installed",
        "  do this: install it as an extra: pip install 'blockpress[eval]'",
    ]


@pytest.mark.parametrize(
    ("arguments", "error_id"),
    [
        (("--tasks", "piqa", "--tasks-folder", "no/such"), "E-TASKS-FOLDER"),
        (("--tasks-limit", "5"), "E-TASKS-NONE"),
        (("--tasks-folder", "."), "E-TASKS-NONE"),
        (("--tasks", " , "), "E-USAGE"),
        (("--tasks", "piqa", "--tasks-limit", "0"), "E-USAGE"),
    ],
)
def test_tasks_options_that_cannot_be_meant_are_usage_errors(
    terminal: Terminal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    error_id: str,
) -> None:
    """No task, no folder, no document: exit 2."""
    monkeypatch.setattr(harness, "is_installed", lambda: True)
    ended = terminal.run("validate", tmp_path / "no.onnx", *arguments, "-q")
    assert (ended.code, ended.err.split()[0]) == (2, error_id)


def test_tasks_and_structure_only_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run the model; silently leaving them out would look like success."""
    monkeypatch.setattr(harness, "is_installed", lambda: True)
    with pytest.raises(ReportedError) as caught:
        check_request(with_tasks(tmp_path, structure_only=True))
    assert (caught.value.error_id, caught.value.exit_code) == ("E-TASKS-STRUCTURE", 2)


def test_tasks_are_enough_to_validate_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without reference, masks and manifest can be run on tasks all the same."""
    monkeypatch.setattr(harness, "is_installed", lambda: True)
    nothing = {"reference_factory": None, "manifest_path": None, "masks_path": None}
    check_request(with_tasks(tmp_path, **nothing))
    with pytest.raises(ReportedError, match="nothing to compare with"):
        check_request(dataclasses.replace(with_tasks(tmp_path / "b", **nothing), tasks=None))


def test_task_request_crosses_to_the_child(tmp_path: Path) -> None:
    """The request comes back from JSON as it was."""
    request = with_tasks(tmp_path, lm_eval=True)
    assert ValidationRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_task_results_cross_from_the_child() -> None:
    """The report comes back from JSON as it was; an endless figure as NaN."""
    report = ValidationReport((Check("structure", "passed"),), tasks={"onnx": (ACCURACY, PERPLEXITY)})
    assert ValidationReport.from_json(json.loads(json.dumps(report.to_json()))).tasks == report.tasks
    endless = dataclasses.replace(PERPLEXITY, value=math.inf)
    back = TaskResult.from_json(json.loads(json.dumps(endless.to_json())))
    assert math.isnan(back.value)


def test_task_rows_put_both_models_side_by_side() -> None:
    """One row per task and metric; a model on which it was not run has no score."""
    pytorch = dataclasses.replace(ACCURACY, value=0.75, stderr=0.0102)
    report = ValidationReport((), tasks={"onnx": (ACCURACY, PERPLEXITY), "recovered": (pytorch,)})
    assert task_rows(report) == (ROW, ALONE)


def test_task_rows_are_part_of_the_report() -> None:
    """They come back from the report's JSON, and the page shows both figures with their errors."""
    report = sample_report(2, tasks=(ROW, ALONE))
    assert Report.from_tree(json.loads(report.to_json())).tasks == (ROW, ALONE)
    page = render_html(report)
    assert "0.7512 ± 0.0101" in page
    assert "0.7500 ± 0.0102" in page
    assert "word_perplexity ↓" in page


def test_task_table_lines_up_on_the_terminal() -> None:
    """Names on the left, figures on the right, a dash where nothing was run; nothing without tasks."""
    rows = Report(command="validate", output="m.onnx", model={"name": "m"}, tasks=(ROW, ALONE)).tree()[
        "tasks"
    ]
    assert task_table(rows) == [
        "  task  metric              ONNX Runtime          PyTorch  documents",
        "  piqa  acc              0.7512 ± 0.0101  0.7500 ± 0.0102      1\u202f838",
        "  text  word_perplexity            12.35                –          3",
    ]
    assert task_table([]) == []
