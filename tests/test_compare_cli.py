"""``compress compare``: options, text and exit codes; nothing is computed but in the one real run at the end."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import Terminal
from compare_samples import cell, figures, sample_comparison, scored_comparison
from workshop import Workshop

from compressor.cli import compare as cli_compare
from compressor.cli.wording import describe
from compressor.comparing import ComparisonResult
from compressor.comparison.failures import CellFailure
from compressor.comparison.grid import Grid
from compressor.comparison.results import Comparison
from compressor.errors import StoppedSafely
from compressor.progress import CellFinished, CellProgress
from compressor.run.lock import hold_output

GOOD = (cell("wanda", "0.5", "none", figures(20.0, 20.0)), cell("wanda", "0.5", "ebft", figures(20.0, 10.0)))
MEMORY = CellFailure(error_id="E-OUT-OF-MEMORY", message="not enough memory", remedy="use less", exit_code=5)


@dataclass
class FakeCompare:
    """Stands for ``compare``: tells of two cells, raises or returns what the test wants."""

    comparison: Comparison = field(default_factory=lambda: sample_comparison(cells=GOOD))
    error: BaseException | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, model: str, out: str, grid: Grid | None, **options: Any) -> ComparisonResult:
        """Record the call."""
        self.calls.append({"model": model, "grid": grid, **options})
        options["progress"](CellProgress(1, 2, "wanda · 50 % · none"))
        options["progress"](CellProgress(1, 2, "wanda · 50 % · none", "block 1 of 2"))
        options["progress"](CellFinished(1, 2, "wanda · 50 % · none", 3.0, 20.0, 20.0, left_s=30.0))
        options["progress"](CellFinished(2, 2, "wanda · 50 % · ebft", 30.0, 20.0, 10.0))
        if self.error is not None:
            raise self.error
        return ComparisonResult(self.comparison, Path(out))

    @property
    def grid(self) -> Grid:
        """The grid of the last call."""
        grid = self.calls[-1]["grid"]
        assert isinstance(grid, Grid)
        return grid


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs command lines."""
    return Terminal(capsys)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCompare:
    """Stands in for the comparison."""
    fake = FakeCompare()
    monkeypatch.setattr("compressor.comparing.compare", fake)
    return fake


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that is not there yet."""
    return tmp_path / "out"


def test_cli_compare_prints_the_table_on_stdout_and_cells_on_stderr(
    terminal: Terminal, fake: FakeCompare, out: Path
) -> None:
    """The dense model, a row per cell, the protocol, where the page is; meanwhile two lines per cell."""
    ended = terminal.run("compare", "model", "--out", out)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "dense model: perplexity 9.760 on valid.txt"
    assert lines[2].split()[:5] == ["target", "pruner", "recovery", "pruned", "recovered"]
    assert lines[4].split()[:6] == ["50", "%", "wanda", "ebft", "20.00", "10.00"]
    assert "measured       2 of 2 cells" in lines
    assert lines[-1] == f"page           {out / 'compare.html'}"
    told = [line.split(maxsplit=2)[2] for line in ended.err.splitlines()]
    assert told == [
        "cell 1/2       wanda · 50 % · none",
        "cell 1/2       wanda · 50 % · none  perplexity 20.00  3.00 s · 30.0 s left",
        "cell 2/2       wanda · 50 % · ebft  perplexity 20.00 → 10.00  30.0 s",
    ]


def test_cli_compare_prints_what_tasks_gave(terminal: Terminal, fake: FakeCompare, out: Path) -> None:
    """A table of its own behind the others, and the options that lead to it reach the call."""
    fake.comparison = scored_comparison()
    options = ("--tasks", "piqa,text", "--tasks-folder", "mine", "--tasks-limit", "2000")
    ended = terminal.run("compare", "model", "--out", out, *options)
    assert ended.code == 4
    lines = ended.out.splitlines()
    begin = lines.index("zero-shot tasks")
    assert lines[begin + 2].split() == ["dense", "model", "0.7512", "±", "0.0101", "12.35"]
    assert lines[begin + 6].startswith("documents")
    assert "1\u202f838" in lines[begin + 6]
    assert "the first 2\u202f000 documents of each" in ended.out
    call = fake.calls[-1]
    assert (call["tasks"], call["tasks_folder"], call["tasks_limit"]) == (("piqa", "text"), "mine", 2000)


def test_cli_compare_prints_json_and_markdown(terminal: Terminal, fake: FakeCompare, out: Path) -> None:
    """``--json`` is the document, ``--markdown`` the tables, ``-q`` no more than what was measured."""
    assert json.loads(terminal.run("compare", "model", "--out", out, "--json").out) == fake.comparison.tree()
    assert terminal.run("compare", "model", "--out", out, "--markdown").out.startswith(
        "Dense model: perplexity"
    )
    quiet = terminal.run("compare", "model", "--out", out, "-q")
    assert (len(quiet.out.splitlines()), quiet.err) == (2, "")


def test_cli_compare_options_become_the_grid_and_the_recipe(
    terminal: Terminal, fake: FakeCompare, out: Path
) -> None:
    """Lists make one table; the other options reach the recipe or the call."""
    arguments = shlex.split(
        "--pruners wanda,magnitude --recoveries none --sparsities 50%,0.7 --patterns 2:4,4:8 --masks own "
        "--set recovery.epochs=3 --seed 7 --num-calibration-samples 9 --eval-data a.txt --eval-data b.txt "
        "--max-eval-windows 4 --device cpu --share-disk 1.5GiB --force"
    )
    assert terminal.run("compare", "model", "--out", out, *arguments).code == 0
    (table,) = fake.grid.tables
    assert (table.pruners, table.recoveries) == (("wanda", "magnitude"), ("none",))
    assert (table.sparsities, table.patterns) == ((0.5, 0.7), ("2:4", "4:8"))
    call = fake.calls[-1]
    assert call["overrides"] == {
        "calibration.num_samples": 9,
        "evaluation.max_windows": 4,
        "recovery.epochs": 3,
        "seed": 7,
    }
    assert [(text.source, text.max_windows) for text in call["evaluations"]] == [("a.txt", 4), ("b.txt", 4)]
    assert (call["masks"], call["device"], call["force"], call["shared_bytes"]) == (
        "own",
        "cpu",
        True,
        1610612736,
    )


def test_cli_compare_fills_lists_from_the_recipe(terminal: Terminal, fake: FakeCompare, out: Path) -> None:
    """With pruners alone: pruned only and the recipe's recovery, at 50 %."""
    terminal.run("compare", "model", "--out", out, "--pruners", "magnitude")
    (table,) = fake.grid.tables
    assert (table.recoveries, table.sparsities, table.patterns) == (("none", "ebft"), (0.5,), ())


def test_cli_compare_takes_a_grid_file_or_a_preset(terminal: Terminal, fake: FakeCompare, out: Path) -> None:
    """A file is read; a preset is left to the comparison, and without anything it is its default."""
    file = out.with_name("grid.yaml")
    file.write_text("pruners: [wanda]\nrecoveries: [ebft]\nsparsities: [0.6]\n", encoding="utf-8")
    terminal.run("compare", "model", "--out", out, "--grid", file)
    assert fake.grid.tables[0].sparsities == (0.6,)
    terminal.run("compare", "model", "--out", out, "--preset", "paper")
    terminal.run("compare", "model", "--out", out)
    assert [(call["grid"], call["preset"]) for call in fake.calls[1:]] == [(None, "paper"), (None, None)]


@pytest.mark.parametrize(
    ("arguments", "error_id"),
    [
        ("--preset quick --pruners wanda", "E-GRID-TWICE"),
        ("--preset quick --grid a.yaml", "E-GRID-TWICE"),
        ("--grid nowhere.yaml", "E-GRID-NOT-FOUND"),
        ("--sparsities 0.5,1.5", "E-SPARSITY-RANGE"),
        ("--patterns 2:4,8:4", "E-PATTERN-RANGE"),
        ("--pruners wanda,,magnitude", "E-USAGE"),
        ("--share-disk plenty", "E-USAGE"),
        ("--masks mine", "E-USAGE"),
        ("--set recovery.lrr=1", "E-RECIPE-KEY"),
    ],
)
def test_cli_compare_usage_errors(
    terminal: Terminal, fake: FakeCompare, out: Path, arguments: str, error_id: str
) -> None:
    """Bad options end with exit code 2 before anything is opened, and leave no folder."""
    ended = terminal.run("compare", "model", "--out", out, "--json", *shlex.split(arguments))
    assert ended.code == 2
    assert json.loads(ended.out)["error"]["id"] == error_id
    assert fake.calls == []
    assert not out.exists()


@pytest.mark.parametrize(
    ("failed", "code"),
    [((False, False), 0), ((False, True), 4), ((True, True), 5)],
    ids=["none", "one", "all"],
)
def test_cli_compare_exit_code_tells_of_failed_cells(
    terminal: Terminal, fake: FakeCompare, out: Path, failed: tuple[bool, bool], code: int
) -> None:
    """0 when all were measured, 4 when some failed, the failure's own when all did; failures are named."""
    cells = tuple(
        one.model_copy(update={"figures": None, "failure": MEMORY}) if fails else one
        for one, fails in zip(GOOD, failed, strict=True)
    )
    fake.comparison = sample_comparison(cells=cells)
    ended = terminal.run("compare", "model", "--out", out)
    assert ended.code == code
    named = [line for line in ended.out.splitlines() if line.startswith("failed")]
    assert len(named) == sum(failed)
    assert all("E-OUT-OF-MEMORY, not enough memory" in line for line in named)


def test_cli_compare_stopped_ends_with_75(terminal: Terminal, fake: FakeCompare, out: Path) -> None:
    """A stop is told as one that goes on."""
    fake.error = StoppedSafely("E-STOPPED", "stopped after 1 of 2 cells", "run the same command again")
    ended = terminal.run("compare", "model", "--out", out)
    assert ended.code == 75
    assert "stopped after 1 of 2 cells" in ended.err


def test_cli_compare_waits_for_no_other(terminal: Terminal, fake: FakeCompare, out: Path) -> None:
    """A folder that another process holds is refused before anything is loaded."""
    code = (
        "import sys, pathlib; from compressor.run.lock import hold_output\n"
        "with hold_output(pathlib.Path(sys.argv[1]) / 'compare.json'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        ended = terminal.run("compare", "model", "--out", out)
        other.communicate()
    assert ended.code == 6
    assert "E-OUTPUT-LOCKED" in ended.err
    assert fake.calls == []
    with hold_output(out / "compare.json"):
        assert terminal.run("compare", "model", "--out", out).code == 0


def test_cli_compare_failed_cell_is_a_warning() -> None:
    """What a failed cell says while it goes on: its id and message."""
    event = CellFinished(2, 12, "wanda · 2:4 · spp", 1.0, error_id="E-GRID-METHOD", error="no such recovery")
    assert describe(event) == [
        "cell  2/12     wanda · 2:4 · spp  failed: E-GRID-METHOD, no such recovery  1.00 s"
    ]


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("500MB", 500_000_000), ("20 GiB", 20 * 2**30), ("7", 7)]
)
def test_cli_compare_sizes(text: str, size: int) -> None:
    """Binary and decimal units, with a space or without."""
    assert cli_compare.bytes_of(text) == size


def test_cli_compare_measures_a_model(terminal: Terminal, workshop: Workshop, out: Path) -> None:
    """The real command on a tiny model: exit 0, and the numbers of the table are those of the files."""
    texts = workshop.texts
    options = ("--calibration", texts.calibration, "--eval-data", texts.evaluation, "--max-eval-windows", 4)
    ended = terminal.run(
        "compare", workshop.model, "--out", out, "--pruners", "magnitude", "--recoveries", "none",
        "--seqlen", 24, "--num-calibration-samples", 8, "--json", *options,
    )  # fmt: skip
    assert ended.code == 0
    (row,) = json.loads(ended.out)["cells"]
    assert row["status"] == "done"
    assert row["figures"]["perplexity"]["evaluation.jsonl"]["pruned"] > 1
    assert json.loads((out / "compare.json").read_text("utf-8")) == json.loads(ended.out)
