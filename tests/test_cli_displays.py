"""What ``compress run`` shows on a terminal: the live line, colours, and when there are none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_fakes import FakePipeline, Terminal, TerminalStream, install


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs command lines."""
    return Terminal(capsys)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """Stands in for the pipeline."""
    fake = FakePipeline()
    install(monkeypatch, fake)
    return fake


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output path that is free."""
    return tmp_path / "sparse.onnx"


def live_text(
    fake: FakePipeline, out: Path, monkeypatch: pytest.MonkeyPatch, terminal: Terminal, *more: str
) -> str:
    """What a terminal of 120 columns gets on stderr."""
    stream = TerminalStream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    fake.during = lambda options: options["stop"]()
    assert terminal.run("run", "model", "--out", out, *more).code == 0
    return stream.getvalue()


def test_cli_displays_terminal_has_a_live_line(
    terminal: Terminal, fake: FakePipeline, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal there is a bar that moves, settled facts above it, and no time stamps."""
    text = live_text(fake, out, monkeypatch, terminal)
    assert "calibration    python-docs, 112 windows × 256 tokens" in text
    assert "blocks         2 of 2 in 22.0 s · the last: loss 0.0512 → 0.0107" in text
    assert "\x1b[" in text  # the live line goes back
    assert " INFO " not in text


def test_cli_displays_verbose_terminal_has_a_line_per_block(
    terminal: Terminal, fake: FakePipeline, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With -v every block stays on the screen, and none is summed up."""
    text = live_text(fake, out, monkeypatch, terminal, "-v")
    assert "block          1/2  loss 0.0412 → 0.0087" in text
    assert "2 of 2" not in text


def test_cli_displays_no_color_is_honoured(
    terminal: Terminal, fake: FakePipeline, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_COLOR takes the colours away, from the live line and from errors."""
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in live_text(fake, out, monkeypatch, terminal).replace("\x1b[3A", "")
    fake.error = ZeroDivisionError()
    stream = TerminalStream()
    monkeypatch.setattr(sys, "stderr", stream)
    terminal.run("run", "model", "--out", out, "-q")
    assert stream.getvalue().startswith("E-INTERNAL  ")


def test_cli_displays_dumb_terminal_gets_plain_lines(
    terminal: Terminal, fake: FakePipeline, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal that cannot move its cursor is treated like a file."""
    stream = TerminalStream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "dumb")
    terminal.run("run", "model", "--out", out)
    assert "\x1b" not in stream.getvalue()
    assert " INFO " in stream.getvalue()


def test_cli_displays_errors_are_red_on_a_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id stands out where colours show."""
    stream = TerminalStream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal.run("rnu")
    assert stream.getvalue().startswith("\x1b[31m\x1b[1mE-USAGE\x1b[0m  no command 'rnu'")
