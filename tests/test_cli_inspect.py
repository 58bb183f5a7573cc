"""``compress inspect``: the table, the totals, JSON and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_fakes import Terminal, TerminalStream
from onnx_samples import pruned_matrix, weight_of, write_product

HEADER = ["weight", "ONNX", "shape", "type", "stored", "nnz", "sparsity", "N:M"]


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs command lines."""
    return Terminal(capsys)


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    """A model of one sparse and one dense weight."""
    weights = [
        weight_of("blocks.2.weight", pruned_matrix((64, 48), 0.75)),
        weight_of("blocks.10.weight", pruned_matrix((48, 8), 0.0)),
    ]
    return write_product(tmp_path, weights)[0]


def test_cli_inspect_prints_a_row_per_weight(terminal: Terminal, onnx: Path) -> None:
    """Shape, type, form, nnz, sparsity and bytes by form, block 2 before block 10, then the totals."""
    ended = terminal.run("inspect", onnx)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].split()[:8] == HEADER
    assert lines[1].split()[:7] == ["blocks.2.weight", "64×48", "float32", "sparse", "768", "75.00", "%"]
    assert lines[2].split()[:7] == ["blocks.10.weight", "48×8", "float32", "dense", "384", "0.00", "%"]
    assert "weights        2 (1 dense, 1 sparse) · 66.67 % zeros · " in ended.out
    assert lines[6].startswith("files          model.onnx ")


def test_cli_inspect_says_what_is_hypothetical(terminal: Terminal, onnx: Path) -> None:
    """Whose shape the table has, and that no file can be stored as a bitmask, stands below it."""
    lines = terminal.run("inspect", onnx).out.splitlines()
    assert lines[0].endswith("(if bitmask)")
    assert lines[4].startswith("ONNX shape     as the graph stores it")
    assert "PyTorch's (out, in)" in lines[4]
    assert lines[5].startswith("(if bitmask)   hypothetical")
    assert lines[8].endswith(" bitmask, hypothetical)")


def test_cli_inspect_takes_a_folder(terminal: Terminal, onnx: Path) -> None:
    """A folder output is named as it was made."""
    assert terminal.run("inspect", onnx.parent).out == terminal.run("inspect", onnx).out


def test_cli_inspect_json_has_every_figure(terminal: Terminal, onnx: Path) -> None:
    """One document with the rows and the totals."""
    document = json.loads(terminal.run("inspect", onnx, "--json").out)
    assert sorted(row["nnz"] for row in document["weights"]) == [384, 768]
    assert document["totals"]["nnz"] == 1152


def test_cli_inspect_quiet_prints_the_totals(terminal: Terminal, onnx: Path) -> None:
    """With -q the rows are left out."""
    assert len(terminal.run("inspect", onnx, "-q").out.splitlines()) == 4


def test_cli_inspect_draws_a_table_on_a_terminal(
    terminal: Terminal, onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow terminal folds long cells instead of losing them."""
    stream = TerminalStream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.run("inspect", onnx)
    lines = click.unstyle(stream.getvalue()).splitlines()
    assert any("───" in line for line in lines)
    assert max(len(line) for line in lines[:6]) <= 120
    assert any("blocks.2.weight" in line and "64×48" in line for line in lines)


def test_cli_inspect_reader_that_is_gone_is_no_error(onnx: Path) -> None:
    """``| head`` closing stdout before anything is printed: no message, and the exit code of the command."""
    with subprocess.Popen(
        [sys.executable, "-m", "compressor", "inspect", str(onnx), "-q"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_cli_inspect_truncated_file_exits_3(terminal: Terminal, onnx: Path) -> None:
    """A broken file is refused in two lines."""
    onnx.write_bytes(onnx.read_bytes()[:-7])
    ended = terminal.run("inspect", onnx)
    assert (ended.code, ended.out) == (3, "")
    assert ended.err.startswith("E-ONNX-")
    assert len(ended.err.splitlines()) == 2


def test_cli_inspect_file_that_is_not_there(terminal: Terminal, tmp_path: Path) -> None:
    """A path without a file is refused, with the same as JSON."""
    ended = terminal.run("inspect", tmp_path / "no.onnx", "--json")
    assert (ended.code, json.loads(ended.out)["error"]["exit_code"]) == (3, 3)
