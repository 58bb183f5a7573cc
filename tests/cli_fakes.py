"""A pipeline that computes nothing, for the tests of the command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from report_samples import sample_report

from compressor.cli import main
from compressor.progress import (
    BlockFinished,
    BlockProgress,
    LearningRateChosen,
    Notice,
    RunStarted,
    StageStarted,
    TextReady,
)
from compressor.report.schema import CheckRow, Report, ValidationFacts

EVENTS = (
    StageStarted("open", "some/model"),
    RunStarted("model", "llama", 2, 800_000, "bfloat16", "float16", "cpu", "0.5", "wanda", "ebft"),
    TextReady("calibration", "python-docs", 112, 256, 16),
    TextReady("evaluation", "python-docs", 64, 256),
    LearningRateChosen(1e-3, (3e-4, 1e-3, 3e-3), 1),
    BlockProgress(0, 2, 5, 20),
    BlockFinished(0, 2, 0.0412, 0.0087, 290, 320, 11.0),
    BlockFinished(1, 2, 0.0512, 0.0107, 0, 320, 11.0),
    Notice("expert 3 saw no token"),
    Notice("45.00 % of the pruned weights are zero, not 50 %", shortfall=True),
    StageStarted("export"),
    StageStarted("validate"),
)
FAILED_CHECK = CheckRow(
    name="perplexity-increase", status="failed", measured=0.316, limit=0.15, unit="relative", why="too much"
)


def report_with(verdict: bool | None, **changes: Any) -> Report:
    """A run's report that passed, failed a gate, or was not validated."""
    if verdict:
        return sample_report(2, **changes)
    checks = (FAILED_CHECK,) if verdict is False else ()
    return sample_report(2, validation=ValidationFacts(passed=verdict, checks=checks), **changes)


@dataclass(frozen=True)
class Result:
    """What the real pipelines return."""

    out: Path
    report: dict[str, Any]
    report_path: Path
    html_path: Path
    passed: bool | None


@dataclass
class FakePipeline:
    """Stands for ``compress`` and ``export``: shows the events, raises or returns what the test wants."""

    report: Report = field(default_factory=lambda: report_with(True))
    error: BaseException | None = None
    during: Callable[[dict[str, Any]], None] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, model: str, out: str, recipe: Any = None, **options: Any) -> Result:
        """Record the call."""
        self.calls.append({"model": model, "out": out, "recipe": recipe, **options})
        for event in EVENTS:
            options["progress"](event)
        if self.during is not None:
            self.during(options)
        if self.error is not None:
            raise self.error
        onnx = Path(out)
        return Result(
            onnx,
            self.report.tree(),
            onnx.with_suffix(".report.json"),
            onnx.with_suffix(".report.html"),
            self.report.validation.passed,
        )


def install(patch: pytest.MonkeyPatch, fake: FakePipeline) -> None:
    """Put ``fake`` in the place of both pipelines, without loading them: they load torch."""
    for module, name in (("compressor.pipeline", "compress"), ("compressor.exporting", "export")):
        stand_in = ModuleType(module)
        setattr(stand_in, name, fake)
        patch.setitem(sys.modules, module, stand_in)


@dataclass(frozen=True)
class Ended:
    """Exit code and text of a command."""

    code: int
    out: str
    err: str


@dataclass
class Terminal:
    """Runs command lines in this process."""

    capture: pytest.CaptureFixture[str]

    def run(self, *arguments: str | Path) -> Ended:
        """What the command line leaves."""
        self.capture.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self.capture.readouterr()
        return Ended(code, out, err)


class TerminalStream(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True
