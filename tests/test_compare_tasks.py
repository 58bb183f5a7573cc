"""Zero-shot tasks of a comparison: which models are scored, what is kept, what is scored again; lm-eval is faked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fakes import Terminal
from compare_bench import Bench
from workshop import Workshop

from compressor.comparing import ComparisonResult
from compressor.comparison.task_set import folder_digest
from compressor.errors import ReportedError, StoppedSafely
from compressor.models.reference import load_reference
from compressor.progress import StageStarted, TaskProgress
from validators import harness
from validators.checks import TaskResult
from validators.errors import ValidationError

IDS = np.array([[1, 2, 3, 5, 8]])
ONE = {"pruners": ["wanda"], "recoveries": ["none", "ebft"], "sparsities": [0.5]}


def spread(model: Any) -> float:
    """A figure that no two models share."""
    return float(model.logits(IDS).std())


@dataclass
class FakeHarness:
    """Stands for lm-eval: scores a model by the spread of its logits.

    Attributes:
        scored: What each model came to, in order.
        limits: What each was limited to.
        on_model: Called with the number of each model before it is scored.
    """

    scored: list[float] = field(default_factory=list)
    limits: list[int | None] = field(default_factory=list)
    on_model: Callable[[int], None] = lambda number: None

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Any,
        *,
        limit: int | None,
        max_tokens: int,
        on_request: Callable[[int, int], None],
    ) -> tuple[TaskResult, ...]:
        """One metric for each task."""
        self.on_model(len(self.scored))
        on_request(1, 2)
        on_request(2, 2)
        self.scored.append(spread(model))
        self.limits.append(limit)
        return tuple(TaskResult(name, "acc", self.scored[-1], 0.01, limit or 7, True) for name in tasks)

    def take_scored(self) -> int:
        """How many models were scored since the last call."""
        count = len(self.scored)
        self.scored.clear()
        return count


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> FakeHarness:
    """In lm-eval's place."""
    fake = FakeHarness()
    monkeypatch.setattr(harness, "is_installed", lambda: True)
    monkeypatch.setattr("compressor.comparison.task_set.harness_version", lambda: "0.0")
    monkeypatch.setattr("compressor.comparison.scored_model.load_tasks", lambda names, folder: names)
    monkeypatch.setattr("compressor.comparison.scored_model.evaluate_tasks", fake.evaluate)
    return fake


@pytest.fixture(scope="module")
def bench(workshop: Workshop) -> Bench:
    """Comparisons."""
    return Bench(workshop)


def values(result: ComparisonResult) -> list[float | None]:
    """What the first task gave on each cell's model."""
    return [cell.scores.results[0].value if cell.scores else None for cell in result.comparison.cells]


# Which models are scored


@pytest.mark.parametrize(("pruner", "recovery"), [("sparsegpt", "ebft"), ("flap", "lora")])
def test_compare_tasks_score_the_dense_model_once_and_what_cells_end_with(
    bench: Bench, workshop: Workshop, lm_eval: FakeHarness, tmp_path: Path, pruner: str, recovery: str
) -> None:
    """The dense model comes first; a cell's model is, bit for bit, the folder of ``compress run``, shapes included."""
    grid = {**ONE, "pruners": [pruner], "recoveries": ["none", recovery], "masks": "own"}
    result = bench.run(tmp_path / "out", grid, tasks=("b", "a"), tasks_limit=5)
    facts = result.comparison.tasks
    assert facts is not None
    assert facts.dense is not None
    assert [one.task for one in facts.dense.results] == ["b", "a"]
    assert facts.dense.results[0].value == spread(load_reference(str(workshop.model)))
    assert (facts.names, facts.limit, facts.lm_eval) == (("b", "a"), 5, "0.0")
    run = workshop.quick(tmp_path / "run.onnx", pruning__method=pruner, recovery__method=recovery)
    assert values(result)[1] == spread(load_reference(str(run.out.with_suffix(".hf"))))
    assert len(lm_eval.scored) == 3
    assert lm_eval.limits == [5, 5, 5]
    assert [event.detail for event in bench.events if isinstance(event, StageStarted)][1:] == [
        "on the dense model"
    ]
    assert any(isinstance(event, TaskProgress) for event in bench.events)
    assert {path.name for path in (result.folder / ".compare").iterdir()} == {"cells", "scores", "state.json"}


def test_compare_tasks_leave_out_a_pruned_model_that_is_in_no_table(
    bench: Bench, lm_eval: FakeHarness, tmp_path: Path
) -> None:
    """The pruned model that repairs share is scored where it is a cell itself, and then it is pruned once."""
    alone = bench.run(tmp_path / "a", {**ONE, "recoveries": ["ebft"]}, tasks=("a",))
    assert lm_eval.take_scored() == 2
    both = bench.run(tmp_path / "b", {**ONE, "recoveries": ["ebft", "none"]}, tasks=("a",))
    assert lm_eval.take_scored() == 3
    assert values(both)[0] == values(alone)[0]
    pruned = [cell.figures and cell.figures.seconds.pruning for cell in both.comparison.cells]
    assert pruned[0] == pruned[1]


# Going on


def test_compare_tasks_again_score_nothing(bench: Bench, lm_eval: FakeHarness, tmp_path: Path) -> None:
    """The same command finds all scores; without tasks its figures serve, too, and the scores stay."""
    first = bench.run(tmp_path / "out", ONE, tasks=("a",))
    lm_eval.take_scored()
    assert bench.run(tmp_path / "out", ONE, tasks=("a",)).comparison == first.comparison
    without = bench.run(tmp_path / "out", ONE)
    assert bench.made() == []
    assert (without.comparison.tasks, values(without)) == (None, [None, None])
    assert values(bench.run(tmp_path / "out", ONE, tasks=("a",))) == values(first)
    assert lm_eval.take_scored() == 0


def test_compare_tasks_that_changed_make_the_cells_again(
    bench: Bench, lm_eval: FakeHarness, tmp_path: Path
) -> None:
    """Other tasks, another limit, another file in their folder: every model is scored again, its figures stay."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a.yaml").write_text("task: a", encoding="utf-8")
    before = bench.run(tmp_path / "out", ONE)
    asked: dict[str, Any] = {"tasks": ("a",), "tasks_folder": folder}
    for changes in ({}, {"tasks_limit": 3}, {"tasks": ("a", "b")}):
        asked.update(changes)
        bench.run(tmp_path / "out", ONE, **asked)
        assert len(bench.made()) == 2
        assert lm_eval.take_scored() == 3
    (folder / "a.yaml").write_text("task: a # changed", encoding="utf-8")
    after = bench.run(tmp_path / "out", ONE, **asked)
    assert lm_eval.take_scored() == 3
    moved = bench.run(
        tmp_path / "out", ONE, **{**asked, "tasks_folder": folder.rename(tmp_path / "elsewhere")}
    )
    assert lm_eval.take_scored() == 0
    for result in (after, moved):
        assert [cell.figures for cell in result.comparison.cells] == [
            cell.figures for cell in before.comparison.cells
        ]


def test_compare_stopped_in_the_tasks_goes_on_with_the_finished_model(
    bench: Bench, lm_eval: FakeHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell is open until it is scored, and its pass is not made again."""
    asked: list[bool] = []
    lm_eval.on_model = lambda number: asked.append(True) if number == 1 else None
    with pytest.raises(StoppedSafely, match="after 0 of 1 cells"):
        bench.run(tmp_path / "out", {**ONE, "recoveries": ["none"]}, tasks=("a",), stop=lambda: bool(asked))
    page = (tmp_path / "out" / "compare.html").read_text("utf-8")
    assert "1 not made yet" in page
    monkeypatch.setattr("compressor.comparison.cell.run_cell", None)
    again = bench.run(tmp_path / "out", {**ONE, "recoveries": ["none"]}, tasks=("a",))
    assert len(set(lm_eval.scored)) == 2
    assert [cell.status for cell in again.comparison.cells] == ["done"]


def test_compare_task_digest_leaves_out_what_python_and_others_leave_there(tmp_path: Path) -> None:
    """Compiled code and hidden files change nothing; a file's name and content do."""
    (tmp_path / "a.yaml").write_text("a", encoding="utf-8")
    before = folder_digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    for name in ("__pycache__/a.pyc", ".a.yaml.swp"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert folder_digest(tmp_path) == before
    (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
    assert folder_digest(tmp_path) != before


# What fails


def test_compare_tasks_that_cannot_be_run_end_it_before_any_cell(
    bench: Bench, lm_eval: FakeHarness, tmp_path: Path
) -> None:
    """What fails on the dense model would fail on every cell: it is the comparison's own error."""

    def refuse(number: int) -> None:
        raise ValidationError("E-TASK-FAILED", "lm-eval cannot run a: why", "look at it")

    lm_eval.on_model = refuse
    with pytest.raises(ReportedError, match="cannot run a") as caught:
        bench.run(tmp_path / "out", ONE, tasks=("a",))
    assert (caught.value.error_id, caught.value.exit_code) == ("E-TASK-FAILED", 3)
    assert bench.made() == []


def test_compare_cell_whose_tasks_fail_keeps_its_figures(
    bench: Bench, lm_eval: FakeHarness, tmp_path: Path
) -> None:
    """The cell counts as failed and says why, its perplexity is told all the same, and no model is left behind."""

    def stumble(number: int) -> None:
        if number == 1:
            lm_eval.on_model = lambda number: None
            raise MemoryError

    lm_eval.on_model = stumble
    result = bench.run(tmp_path / "out", ONE, tasks=("a",))
    first, second = result.comparison.cells
    assert (first.status, second.status) == ("failed", "done")
    assert first.failure is not None
    assert first.failure.error_id == "E-OUT-OF-MEMORY"
    assert first.figures is not None
    assert first.scores is None
    assert "E-OUT-OF-MEMORY" in (tmp_path / "out" / "compare.md").read_text("utf-8").split("Zero-shot")[1]
    bench.run(tmp_path / "out", ONE, tasks=("a",))
    assert bench.made() == ["wanda · 50 % · none"]


def test_compare_tasks_without_lm_eval_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 5 with the way to install it, before the model is opened, and no folder is left."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    ended = Terminal(capsys).run(
        "compare", tmp_path / "no-model", "--out", tmp_path / "out", "--tasks", "piqa", "-q"
    )
    assert (ended.code, ended.err.split()[0]) == (5, "E-LM-EVAL-MISSING")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--tasks-limit", "5"), ("--tasks-folder", ".")])
def test_compare_options_of_tasks_need_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    """A folder or a limit without a task is exit 2."""
    ended = Terminal(capsys).run("compare", tmp_path / "no-model", "--out", tmp_path / "out", *option, "-q")
    assert (ended.code, ended.err.split()[0]) == (2, "E-TASKS-NONE")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
