"""``compress run`` and ``compress export``: options, text and exit codes; the pipeline computes nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import signal
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
from cli_fakes import FakePipeline, Terminal, install, report_with

from compressor import errors
from compressor.cli.failures import Interrupted
from compressor.cli.wording import describe
from compressor.progress import BlockFinished
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.run.lock import hold_output
from exporters.errors import ExportError


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs command lines."""
    return Terminal(capsys)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """Stands in for both pipelines."""
    fake = FakePipeline()
    install(monkeypatch, fake)
    return fake


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output path that is free."""
    return tmp_path / "sparse.onnx"


def recipe_of(fake: FakePipeline) -> Recipe:
    """The recipe that the last call got."""
    recipe = fake.calls[-1]["recipe"]
    assert isinstance(recipe, Recipe)
    return recipe


@pytest.mark.parametrize("command", ["run", "export"])
def test_cli_run_prints_results_on_stdout_and_progress_on_stderr(
    terminal: Terminal, fake: FakePipeline, out: Path, command: str
) -> None:
    """Perplexities, sizes, verdict and report on stdout; what happens meanwhile is not among them."""
    ended = terminal.run(command, "model", "--out", out)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["dense", "9.76", "1.43", "GiB"],
        ["pruned", "only", "31.20"],
        ["recovered", "12.84"],
        ["ONNX", "Runtime", "12.84", "1.29", "GiB", "(90", "%)"],
    ]
    assert f"PASSED  {out} · 60.00 % of the pruned weights are zero · 10 checks passed · 1 skipped" in lines
    assert f"report         {out.with_suffix('.report.html')}" in lines
    assert lines[-1].startswith("Smaller on disk, not faster: stock ONNX Runtime expands sparse initializers")
    assert "loss" not in ended.out


def test_cli_run_progress_lines_have_time_and_level(
    terminal: Terminal, fake: FakePipeline, out: Path
) -> None:
    """Without a terminal every event is one plain line; a step inside a block is none."""
    lines = [
        line.split(maxsplit=2)[1:] for line in terminal.run("run", "model", "--out", out).err.splitlines()
    ]
    assert lines[:6] == [
        ["INFO", "open           some/model"],
        ["INFO", "model            llama · 2 blocks · 800 K weights to prune · bfloat16 → float16 · cpu"],
        ["INFO", "plan           prune 50 % by wanda · recovery ebft"],
        ["INFO", "calibration    python-docs, 112 windows × 256 tokens, 16 more held out"],
        ["INFO", "evaluation     python-docs, 64 windows × 256 tokens"],
        ["INFO", "learning rate  0.001, best of 3e−4, 0.001, 0.003 on held-out windows"],
    ]
    best = "(best at step 290 of 320)"
    assert lines[6] == ["INFO", f"block          1/2  loss 0.0412 → 0.0087 {best}  11.0 s · 11.0 s left"]
    assert lines[7] == ["INFO", "block          2/2  loss 0.0512 → 0.0107 (best at step 0 of 320)  11.0 s"]
    assert lines[8:] == [
        ["INFO", "note           expert 3 saw no token"],
        ["WARNING", "warning        45.00 % of the pruned weights are zero, not 50 %"],
        ["INFO", "export"],
        ["INFO", "validate"],
    ]


def test_cli_run_block_without_a_repair_has_no_loss() -> None:
    """Where nothing was repaired nothing is said of a loss."""
    unrepaired = BlockFinished(0, 2, None, None, 0, 0, 1.5)
    assert describe(unrepaired) == ["block          1/2  1.50 s"]


def test_cli_run_options_become_the_recipe(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """Every option of the issue reaches the recipe or the call."""
    arguments = shlex.split(
        "--pattern 2:4 --pruner sparsegpt --recovery none --calibration c.jsonl --dataset-config en "
        "--split train --text-column body --eval-data e.txt --max-eval-windows 3 "
        "--num-calibration-samples 9 --seqlen 77 --epochs 2 --lr 1e-3 --batch-size 4 "
        "--ignore '*.o_proj' --ignore 're:q_.*' --dtype bfloat16 "
        "--encoding sparse --opset 20 --seed 7 --max-abs-error 0.5 --min-top1-agreement 99% "
        "--max-onnx-ppl-drift 0.1% --max-ppl-increase 15% --min-sparsity 0.4 --device cuda:1 --revision abc "
        "--trust-remote-code --force --no-validate --provider CPU --require manifest --require masks "
        "--resume never --activation-memory 3GiB --max-device-memory 20GiB"
    )
    assert terminal.run("run", "model", "--out", out, *arguments).code == 0
    expected = {
        "pruning.pattern": "2:4",
        "pruning.method": "sparsegpt",
        "pruning.ignore": ["*.o_proj", "re:q_.*"],
        "recovery.method": "none",
        "recovery.epochs": 2,
        "recovery.lr": 1e-3,
        "recovery.batch_size": 4,
        "calibration.source": "c.jsonl",
        "calibration.dataset_config": "en",
        "calibration.split": "train",
        "calibration.text_column": "body",
        "calibration.num_samples": 9,
        "calibration.seqlen": 77,
        "evaluation.source": "e.txt",
        "evaluation.max_windows": 3,
        "export.dtype": "bfloat16",
        "export.encoding": "sparse",
        "export.opset": 20,
        "gates.max_abs_error": 0.5,
        "gates.min_top1_agreement": 0.99,
        "gates.max_onnx_ppl_drift": 0.001,
        "gates.max_ppl_increase": 0.15,
        "gates.min_sparsity": 0.4,
        "seed": 7,
    }
    assert recipe_of(fake) == read_recipe(None, expected)
    call = {key: value for key, value in fake.calls[0].items() if key not in ("recipe", "progress", "stop")}
    assert call == {
        "model": "model",
        "out": str(out),
        "force": True,
        "validate": False,
        "device": "cuda:1",
        "revision": "abc",
        "trust_remote_code": True,
        "provider": "CPU",
        "parity": "auto",
        "require": ("manifest", "masks"),
        "resume": "never",
        "activation_memory": 3 * 2**30,
        "max_device_memory": 20 * 2**30,
    }


def test_cli_run_options_of_structure_become_the_recipe(
    terminal: Terminal, fake: FakePipeline, out: Path
) -> None:
    """A flag without a value sets its key, and leaves it to the recipe where it is not given."""
    assert terminal.run("run", "model", "--out", out, "--pruner", "flap", "--uniform").code == 0
    assert recipe_of(fake) == read_recipe(None, {"pruning.method": "flap", "pruning.flap.uniform": True})
    assert terminal.run("run", "model", "--out", out, "--force", "--allocation", "owl").code == 0
    assert recipe_of(fake) == read_recipe(None, {"pruning.allocation": "owl"})
    kept = terminal.run("run", "model", "--out", out, "--force", "--set", "pruning.flap.uniform=true")
    assert kept.code == 0
    assert recipe_of(fake).pruning.flap.uniform is True


def test_cli_run_takes_both_dashes(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """An underscore in an option's name is a dash."""
    assert terminal.run("run", "model", "--out", out, "--max_eval_windows", "3", "--no_validate").code == 0
    assert recipe_of(fake).evaluation.max_windows == 3
    assert fake.calls[-1]["validate"] is False


def test_cli_run_flags_beat_the_recipe_and_it_beats_the_defaults(
    terminal: Terminal, fake: FakePipeline, out: Path, tmp_path: Path
) -> None:
    """Epochs from the flag, batch size from the file, loss from the defaults, schedule from --set."""
    file = tmp_path / "mine.yaml"
    file.write_text("pruning: {pattern: '2:4'}\nrecovery: {epochs: 3, batch_size: 5, schedule: cosine}\n")
    arguments = ["--recipe", file, "--epochs", "4", "--set", "recovery.schedule=linear", "--sparsity", "0.7"]
    assert terminal.run("run", "model", "--out", out, *arguments).code == 0
    recipe = recipe_of(fake)
    assert (recipe.recovery.epochs, recipe.recovery.batch_size) == (4, 5)
    assert (recipe.recovery.schedule, recipe.recovery.loss) == ("linear", "mse")
    assert (recipe.pruning.sparsity, recipe.pruning.pattern) == (0.7, None)


def test_cli_run_takes_a_recipe_by_name(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """A built-in recipe needs no path."""
    assert terminal.run("run", "model", "--out", out, "--recipe", "ebft-paper").code == 0
    assert recipe_of(fake) == read_recipe("ebft-paper")


USAGE = [
    (["--sparsity", "0.5", "--pattern", "2:4"], "E-SPARSITY-AND-PATTERN", "exclude each other"),
    *[(["--sparsity", text], "E-SPARSITY-RANGE", text) for text in ("0", "1", "-0.1", "1.1", "NaN", "50%")],
    (["--set", "pruning.sparsity=1.5"], "E-SPARSITY-RANGE", "1.5"),
    (["--pattern", "2-4"], "E-PATTERN-SYNTAX", "2-4"),
    (["--epochs", "0"], "E-RECIPE-VALUE", "recovery.epochs"),
    (["--epochs", "two"], "E-USAGE", "'two' is not a valid integer"),
    (["--lr", "fast"], "E-USAGE", "'fast' is neither auto nor a number"),
    (["--device", "tpu"], "E-USAGE", "'tpu' is not auto, cpu, cuda or cuda:N"),
    (["--max-ppl-increase", "lots"], "E-USAGE", "'lots' is neither a number nor a percentage"),
    (["--pruner", "random"], "E-USAGE", "'random' is not one of 'magnitude', 'wanda', 'sparsegpt'"),
    (["--set", "recovery.epochs"], "E-SET-SYNTAX", "KEY=VALUE"),
    (["--set", "recovery.epochs=[1"], "E-SET-SYNTAX", "[1"),
    (["--set", "recovery.epochs=2", "--epochs", "3"], "E-SET-TWICE", "recovery.epochs is set twice"),
    (["--set", "recovery.epoch=2"], "E-RECIPE-KEY", "--set: unknown key recovery.epoch"),
    (["--set", "foo.bar=1"], "E-RECIPE-KEY", "--set: unknown key foo.bar"),
    (["--recipe", "defualt"], "E-RECIPE-NOT-FOUND", "defualt"),
    (["--sparsty", "0.5"], "E-USAGE", "--sparsty"),
]


@pytest.mark.parametrize(("arguments", "error_id", "says"), USAGE)
def test_cli_run_usage_error_exits_2(
    terminal: Terminal, fake: FakePipeline, out: Path, arguments: list[str], error_id: str, says: str
) -> None:
    """What cannot be meant is refused before any work, in two lines on stderr."""
    ended = terminal.run("run", "model", "--out", out, *arguments)
    assert (ended.code, ended.out, fake.calls) == (2, "", [])
    first, second = ended.err.splitlines()
    assert first.startswith(f"{error_id}  ")
    assert says in first
    assert second.startswith("  do this: ")


def test_cli_run_unknown_key_names_the_nearest(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """The remedy is the key that was probably meant, in the same section."""
    ended = terminal.run("run", "model", "--out", out, "--set", "recovery.epoch=2")
    assert "do this: did you mean recovery.epochs?" in ended.err


FAILURES: list[tuple[BaseException, str, int]] = [
    (errors.UsageError("E-X", "m", "r"), "E-X", 2),
    (errors.InputRefused("E-X", "m", "r"), "E-X", 3),
    (ExportError("E-X", "m", "r"), "E-X", 3),
    (errors.GateFailed("E-X", "m", "r"), "E-X", 4),
    (errors.OutOfResources("E-X", "m", "r"), "E-X", 5),
    (MemoryError(), "E-OUT-OF-MEMORY", 5),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "E-OUT-OF-MEMORY", 5),
    (OSError(errno.ENOSPC, "No space left on device"), "E-DISK-FULL", 5),
    (errors.OutputRefused("E-X", "m", "r"), "E-X", 6),
    (errors.HubError("E-X", "m", "r"), "E-X", 7),
    (errors.StoppedSafely("E-X", "m", "r"), "E-X", 75),
    (KeyboardInterrupt(), "E-INTERRUPTED", 130),
    (Interrupted(signal.SIGTERM), "E-INTERRUPTED", 143),
    (click.Abort(), "E-INTERRUPTED", 130),
    (SystemExit(0), "E-INTERNAL", 1),
    (ZeroDivisionError("division by zero"), "E-INTERNAL", 1),
]


@pytest.mark.parametrize(("error", "error_id", "code"), FAILURES)
def test_cli_run_error_has_its_exit_code(
    terminal: Terminal, fake: FakePipeline, out: Path, error: BaseException, error_id: str, code: int
) -> None:
    """Each kind of error ends with its code: a line says what, a line what to do; no traceback."""
    fake.error = error
    ended = terminal.run("run", "model", "--out", out, "-q")
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith(f"{error_id}  ")
    assert len(ended.err.splitlines()) == 2
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(("error", "error_id", "code"), FAILURES)
def test_cli_run_error_is_one_json_object(
    terminal: Terminal, fake: FakePipeline, out: Path, error: BaseException, error_id: str, code: int
) -> None:
    """With --json the error is one object on stdout."""
    fake.error = error
    ended = terminal.run("run", "model", "--out", out, "--json", "-q")
    document = json.loads(ended.out)
    assert ended.code == code
    assert (document["error"]["id"], document["error"]["exit_code"]) == (error_id, code)
    assert set(document["error"]) == {"id", "message", "remedy", "exit_code"}
    assert ended.err == ""


def test_cli_run_bug_leaves_its_traceback_in_the_log(
    terminal: Terminal, fake: FakePipeline, out: Path, cache_of_its_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user gets one line and the log's path; the log has the traceback, without access tokens."""
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    fake.error = ZeroDivisionError("secret-token and hf_abcdefghijkl")
    ended = terminal.run("run", "model", "--out", out, "-q")
    log = next((cache_of_its_own / "logs").glob("*-run.log"))
    assert f"do this: send the log file {log} with a report" in ended.err
    assert "ZeroDivisionError: hf_*** and hf_***" in ended.err
    text = log.read_text()
    assert "Traceback" in text
    assert "ZeroDivisionError: hf_*** and hf_***" in text


def test_cli_run_failed_gate_exits_4(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """A failed gate is named with what was measured and the limit; -q shows that and the verdict alone."""
    fake.report = report_with(False)
    ended = terminal.run("run", "model", "--out", out, "-q")
    assert ended.code == 4
    assert ended.out.splitlines() == [
        "perplexity-increase  failed   0.316 relative, limit 0.15 · too much",
        f"FAILED  {out} · 60.00 % of the pruned weights are zero · 1 check failed",
    ]
    assert ended.err == ""


def test_cli_run_without_validation_says_so(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """No verdict is no pass, and no failure."""
    fake.report = report_with(None)
    ended = terminal.run("run", "model", "--out", out, "--no-validate")
    assert ended.code == 0
    assert f"NOT VALIDATED  {out}" in ended.out


@pytest.mark.parametrize("verdict", [True, False])
def test_cli_run_json_prints_the_report(
    terminal: Terminal, fake: FakePipeline, out: Path, verdict: bool
) -> None:
    """One document on stdout, whether it passed or not."""
    fake.report = report_with(verdict)
    ended = terminal.run("run", "model", "--out", out, "--json")
    assert json.loads(ended.out) == fake.report.tree()
    assert ended.code == (0 if verdict else 4)


def test_cli_run_says_when_nothing_got_smaller(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """A file without any sparse initializer is not called smaller."""
    size = fake.report.size
    only_dense = {"dense": size.by_encoding["dense"]}
    fake.report = report_with(True, size=size.model_copy(update={"by_encoding": only_dense}))
    ended = terminal.run("run", "model", "--out", out)
    assert "Every weight is stored dense" in ended.out
    assert "Smaller on disk" not in ended.out


def test_cli_run_shows_a_perplexity_that_is_no_number(
    terminal: Terminal, fake: FakePipeline, out: Path
) -> None:
    """NaN is shown as NaN, not as something that was not measured."""
    facts = fake.report.perplexity.model_copy(update={"onnx": float("nan"), "dense": None})
    fake.report = report_with(True, perplexity=facts)
    ended = terminal.run("run", "model", "--out", out)
    assert ["ONNX", "Runtime", "NaN"] in [line.split()[:3] for line in ended.out.splitlines()]
    assert ["dense", "not", "measured"] in [line.split()[:3] for line in ended.out.splitlines()]


def test_cli_run_tells_notices_that_were_no_events(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """What only the report says is told once; what was told already is not told again."""
    fake.report = report_with(True, notices=("expert 3 saw no token", "both wheels are installed"))
    err = terminal.run("run", "model", "--out", out).err
    assert err.count("expert 3 saw no token") == 1
    assert err.count("both wheels are installed") == 1


def test_cli_run_output_that_exists_is_refused_before_the_pipeline(
    terminal: Terminal, fake: FakePipeline, out: Path
) -> None:
    """Exit 6, and the file is as it was."""
    out.write_text("old")
    ended = terminal.run("run", "model", "--out", out)
    assert (ended.code, fake.calls, out.read_text()) == (6, [], "old")
    assert ended.err.splitlines()[0] == f"E-OUTPUT-EXISTS  {out} exists already"
    assert terminal.run("run", "model", "--out", out, "--force").code == 0


def test_cli_run_holds_the_lock_and_gives_it_back(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """The pipeline runs inside the lock; after an error it is free."""

    def enter_again(_: dict[str, Any]) -> None:
        with hold_output(out):
            raise ZeroDivisionError

    fake.during = enter_again
    assert terminal.run("run", "model", "--out", out).code == 1
    fake.during = None
    assert terminal.run("run", "model", "--out", out).code == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_cli_run_first_signal_asks_second_stops(
    terminal: Terminal, fake: FakePipeline, out: Path, signum: signal.Signals, code: int
) -> None:
    """One signal turns the stop request on and says so; another one ends the run at once."""
    asked: list[bool] = []

    def twice(options: dict[str, Any]) -> None:
        asked.append(options["stop"]())
        os.kill(os.getpid(), signum)
        asked.append(options["stop"]())
        os.kill(os.getpid(), signum)
        asked.append(True)  # pragma: no cover - the second signal comes first

    before = signal.getsignal(signum)
    fake.during = twice
    ended = terminal.run("run", "model", "--out", out)
    assert (ended.code, asked) == (code, [False, True])
    assert "stopping at the next safe point; once more stops at once" in ended.err
    assert f"E-INTERRUPTED  stopped by {signum.name}" in ended.err
    assert signal.getsignal(signum) is before


def test_cli_export_stops_at_the_first_signal(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """A command without blocks has nothing to wait for."""
    fake.during = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    assert terminal.run("export", "model", "--out", out).code == 143


@pytest.mark.filterwarnings("default:mind the gap")
def test_cli_run_log_file_tells_the_run(
    terminal: Terminal, fake: FakePipeline, out: Path, cache_of_its_own: Path
) -> None:
    """The log has what was shown, also with -q, and warnings of libraries."""
    fake.during = lambda _: warnings.warn("mind the gap", UserWarning, stacklevel=1)
    ended = terminal.run("run", "model", "--out", out, "-q")
    text = next((cache_of_its_own / "logs").glob("*-run.log")).read_text()
    assert "block          2/2  loss 0.0512 → 0.0107" in text
    assert "mind the gap" in text
    assert ended.err == ""


def test_cli_run_leaves_logging_as_it_was(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """A program that calls main() keeps its own logging, also after a failure."""
    before = (logging.root.level, list(logging.root.handlers))
    terminal.run("run", "model", "--out", out, "-v")
    fake.error = ZeroDivisionError()
    terminal.run("run", "model", "--out", out, "-v")
    assert (logging.root.level, list(logging.root.handlers)) == before


def test_cli_run_verbose_shows_what_libraries_log(terminal: Terminal, fake: FakePipeline, out: Path) -> None:
    """With -v a warning reaches stderr, with time and level, with -vv any record; without, only the log file."""

    def log(_: object) -> None:
        logging.getLogger("some.library").warning("something odd")
        logging.getLogger("some.library").info("something usual")

    fake.during = log
    shown = {flag: terminal.run("run", "model", "--out", out, flag).err for flag in ("--force", "-v", "-vv")}
    assert ["something odd" in text for text in shown.values()] == [False, True, True]
    assert ["something usual" in text for text in shown.values()] == [False, False, True]
    assert "WARNING some.library: something odd" in shown["-v"]
