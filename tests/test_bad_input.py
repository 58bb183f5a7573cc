"""Bad input through the real command line: the right id and exit code, nothing lost, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_bench import check_json, check_text, nothing_changes, open_bench
from bad_exports import EXPORTS, BadExport, Refusal
from bad_inputs import MODELS, TEXTS, BadInput, Bench
from bad_options import OUTPUTS, PRUNING, SETTINGS
from cli_fakes import Ended, Terminal
from workshop import Workshop

ROOT = Path(__file__).parents[1]
RUN = (*MODELS, *TEXTS, *PRUNING, *SETTINGS, *OUTPUTS)
VALIDATED = [(bad, bad.validate) for bad in EXPORTS if bad.validate is not None]
INSPECTED = [(bad, bad.inspect) for bad in EXPORTS if bad.inspect is not None]
# What is refused after the output was opened: at the model, at its weights, at its tokenizer, at the texts.
LATE = (
    "quantised tensors",
    "weight not a number",
    "tokenizer beyond the embedding",
    "--eval-data too short",
)


@pytest.fixture
def bench(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A model, two texts and an older output, to be spoiled."""
    return open_bench(workshop, tmp_path, monkeypatch)


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs command lines in this process."""
    return Terminal(capsys)


@pytest.mark.parametrize("bad", RUN, ids=lambda bad: bad.name)
def test_bad_input_run_refuses(terminal: Terminal, bench: Bench, bad: BadInput) -> None:
    """Each is refused with its id and exit code; the older output, the inputs and the folders stay as they were."""
    bad.spoil(bench)
    with nothing_changes(bench):
        ended = terminal.run(*bad.command_line(bench, "run"), "-q")
    check_text(ended, (bad.error_id, bad.exit_code), bad.says)


@pytest.mark.parametrize("bad", {bad.error_id: bad for bad in RUN}.values(), ids=lambda bad: bad.error_id)
def test_bad_input_run_refuses_in_json(terminal: Terminal, bench: Bench, bad: BadInput) -> None:
    """Every id comes as one JSON object on stdout too."""
    bad.spoil(bench)
    check_json(terminal.run(*bad.command_line(bench, "run"), "--json"), (bad.error_id, bad.exit_code))


@pytest.mark.parametrize("bad", [bad for bad in RUN if bad.name in LATE], ids=lambda bad: bad.name)
def test_bad_input_export_refuses_beside_a_folder(terminal: Terminal, bench: Bench, bad: BadInput) -> None:
    """``export`` refuses as ``run`` does, and an older output that is a folder survives too."""
    bad.spoil(bench)
    with nothing_changes(bench):
        ended = terminal.run(*bad.command_line(bench, "export"), "-q", "--out", bench.out.parent)
    check_text(ended, (bad.error_id, bad.exit_code), bad.says)


@pytest.mark.parametrize(("bad", "refusal"), VALIDATED, ids=[bad.name for bad, _ in VALIDATED])
def test_bad_input_validate_refuses(
    terminal: Terminal, bench: Bench, bad: BadExport, refusal: Refusal
) -> None:
    """A file that is broken or altered, or cannot be judged as asked, is refused and left as it was."""
    bad.spoil(bench)
    with nothing_changes(bench):
        ended = terminal.run("validate", *(bench.filled(word) for word in (bad.path, *bad.options)), "-q")
    check_text(ended, refusal, bad.says)


@pytest.mark.parametrize(("bad", "refusal"), INSPECTED, ids=[bad.name for bad, _ in INSPECTED])
def test_bad_input_inspect_refuses(
    terminal: Terminal, bench: Bench, bad: BadExport, refusal: Refusal
) -> None:
    """A file that is broken is refused by inspect too, as text and as JSON."""
    bad.spoil(bench)
    with nothing_changes(bench):
        check_text(terminal.run("inspect", bench.filled(bad.path)), refusal, bad.says)
        check_json(terminal.run("inspect", bench.filled(bad.path), "--json"), refusal)


def in_a_process(*arguments: str, **environment: str) -> Ended:
    """What the installed program leaves."""
    ended = subprocess.run(
        [sys.executable, "-m", "compressor", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
        timeout=300,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize(
    "name", ["sparsity 1.1", "weights cut in the tensors", "tokenizer with a wrong limit"]
)
def test_bad_input_in_a_process_of_its_own(bench: Bench, name: str) -> None:
    """What libraries print when they are first loaded does not reach the user either."""
    bad = next(bad for bad in RUN if bad.name == name)
    bad.spoil(bench)
    with nothing_changes(bench):
        ended = in_a_process(*bad.command_line(bench, "run"), "-q")
    check_text(ended, (bad.error_id, bad.exit_code), bad.says)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that nobody can write on Linux only")
def test_bad_input_places_that_cannot_be_written(terminal: Terminal, bench: Bench) -> None:
    """Output, report and cache folder are tried before the work, also where permission bits say nothing."""
    lines = BadInput("", "", 0, "").command_line(bench, "run")
    refusal = ("E-OUTPUT-NOT-WRITABLE", 6)
    check_text(terminal.run(*lines, "-q", "--out", "/proc/sparse.onnx"), refusal, "/proc")
    check_text(terminal.run(*lines, "-q", "--out", "/proc/sparse"), refusal, "/proc")
    unwritable = in_a_process(*lines, "-q", BLOCKPRESS_CACHE="/proc/cache")
    check_text(unwritable, ("E-CACHE-NOT-WRITABLE", 6), "BLOCKPRESS_CACHE")


def test_bad_input_names_cannot_move_the_cursor(terminal: Terminal, bench: Bench) -> None:
    """A name in a file that clears the screen or ends the line is spelled out."""
    ended = terminal.run("validate", str(bench.home / "\x1b[2J\r\n.onnx"), "-q")
    check_text(ended, ("E-ONNX-NOT-FOUND", 3), r"\x1b[2J\r\n.onnx")
