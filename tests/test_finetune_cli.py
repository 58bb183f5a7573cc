"""How the command line shows end-to-end stages, and which options ask for them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from cli_fakes import FakePipeline, Terminal, TerminalStream, install

from compressor.cli.displays import LiveDisplay, PlainDisplay
from compressor.cli.wording import describe, step_line
from compressor.progress import FinetuningFinished, FinetuningProgress, RunStarted, StageStarted
from compressor.recipe import Recipe

STARTED = StageStarted("finish", "kl, all blocks together")
TRIAL = FinetuningProgress("finish", 3, 14, 3e-3, trial=True)
STEP = FinetuningProgress("finish", 12, 70, 1e-3, trial=False)
FINISHED = FinetuningFinished(
    "finish", "kl", "kl", 1.3029, 0.98888, 56, 70, 1e-3, (3e-4, 1e-3, 3e-3), 553_984, 12.3
)


def test_finetuning_is_told_in_one_line() -> None:
    """Losses, best step, weights, rate with its rivals, time."""
    (line,) = describe(FINISHED)
    assert line == (
        "finish         kl 1.303 → 0.9889 (best at step 56 of 70), 554 K weights, learning rate 0.001, "
        "best of 3e−4, 0.001, 0.003  12.3 s"
    )


def test_plan_names_the_finish_only_where_there_is_one() -> None:
    """A run that ends with the repair has the line that it always had."""
    plan = ("model", "Llama", 6, 800_000, "float32", "float32", "cpu", "0.5", "wanda", "ebft")
    assert describe(RunStarted(*plan))[1] == "plan           prune 50 % by wanda · recovery ebft"
    assert describe(RunStarted(*plan, finish="kl"))[1].endswith("recovery ebft · finish kl")


def test_plain_lines_leave_steps_out() -> None:
    """A log has the stage's beginning and its end."""
    stream = io.StringIO()
    display = PlainDisplay(stream)
    for event in (STARTED, TRIAL, STEP, FINISHED):
        display.show(event)
    lines = [line.split(maxsplit=2)[2] for line in stream.getvalue().splitlines()]
    assert lines == ["finish         kl, all blocks together", *describe(FINISHED)]


def test_live_line_shows_steps_and_trials() -> None:
    """The bar counts the steps of the stage, and says which learning rate is being tried."""
    assert step_line(TRIAL) == "trying learning rate 0.003, step 3 of 14"
    assert step_line(STEP) == "step 12 of 70"
    stream = TerminalStream()
    display = LiveDisplay(stream)
    for event in (STARTED, TRIAL, STEP, FINISHED):
        display.show(event)
    display.close()
    shown = stream.getvalue()
    assert "step 12 of 70" in shown
    assert "kl 1.303 → 0.9889 (best at step 56 of 70)" in shown


@pytest.mark.parametrize(
    ("flags", "recovery", "finish"),
    [
        (["--finish", "kl"], "ebft", "kl"),
        (["--recovery", "masked-lora", "--finish", "auto"], "masked-lora", "auto"),
        (["--recovery", "spp"], "spp", "auto"),
    ],
)
def test_options_set_recovery_and_finish(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flags: list[str],
    recovery: str,
    finish: str,
) -> None:
    """``--recovery`` and ``--finish`` end up in the recipe of the run."""
    fake = FakePipeline()
    install(monkeypatch, fake)
    assert Terminal(capsys).run("run", "model", "--out", tmp_path / "sparse.onnx", *flags).code == 0
    recipe = fake.calls[-1]["recipe"]
    assert isinstance(recipe, Recipe)
    assert (recipe.recovery.method, recipe.finish.method) == (recovery, finish)
