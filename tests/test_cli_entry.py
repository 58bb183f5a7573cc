"""The entry: help without torch, versions, unknown commands, closed pipes, and packages of the same name."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import Terminal

import compressor
from compressor.cli import COMMANDS, packages

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "numpy", "pydantic", "rich", "datasets", "yaml"}


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs command lines."""
    return Terminal(capsys)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["validate", "-h"], ["--version"], ["rnu"]]
)
def test_cli_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """What answers without work imports none of the libraries that make it wait."""
    code = (
        "import sys; from compressor.cli import main; main(sys.argv[1:]); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert not HEAVY & set(ended.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_help_explains_each_command(terminal: Terminal, command: str) -> None:
    """The help of a command lists its options; the help of all lists the command."""
    assert f"  {command} " in terminal.run("--help").out
    ended = terminal.run(command, "--help")
    assert ended.code == 0
    assert ended.out.startswith(f"Usage: compress {command} [OPTIONS] ")
    assert "--json" in ended.out


def test_cli_module_is_the_command() -> None:
    """``python -m compressor`` does what ``compress`` does."""
    ended = subprocess.run(
        [sys.executable, "-m", "compressor", "rnu"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "E-USAGE  no command 'rnu'; there are run, compare, validate, export, inspect, bench",
        "  do this: see compress --help",
    ]


def test_cli_version_names_the_distribution(terminal: Terminal) -> None:
    """The distribution has another name than the command."""
    assert terminal.run("--version").out == f"blockpress {compressor.__version__}\n"


def test_cli_without_arguments_shows_help(terminal: Terminal) -> None:
    """No command is a question for help."""
    ended = terminal.run()
    assert (ended.code, ended.err) == (2, "")
    assert ended.out.startswith("Usage: compress [OPTIONS] COMMAND")


def test_cli_usage_error_is_json_too(terminal: Terminal) -> None:
    """An option that nobody knows still answers in JSON when asked to."""
    ended = terminal.run("run", "--json", "--nonsense")
    assert json.loads(ended.out)["error"]["id"] == "E-USAGE"
    assert (ended.code, ended.err) == (2, "")


@pytest.mark.parametrize("reader_waits", [True, False])
def test_cli_closed_stdout_is_quiet(reader_waits: bool) -> None:
    """``| head`` closing the pipe, early or late, brings no traceback."""
    with subprocess.Popen(
        [sys.executable, "-m", "compressor", "run", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if reader_waits:
            process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_cli_json_is_all_of_stdout() -> None:
    """What a native library prints by itself goes to stderr; a program reads stdout."""
    code = (
        "import os; from compressor import cli; "
        "cli._invoke = lambda tokens: os.write(1, b'native\\n') and cli.click.echo('{}'); "
        "cli.main(['--json']); os.write(1, b'afterwards')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "{}\nafterwards"
    assert ended.stderr == "native\n"


def test_cli_api_names_are_lazy() -> None:
    """The package's public names exist, and importing it loads none of them."""
    code = "import sys, compressor; assert 'torch' not in sys.modules; print(*sorted(dir(compressor)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert set(compressor.__all__) <= set(ended.stdout.split())
    for name in compressor.__all__:
        assert getattr(compressor, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        compressor.nothing_of_the_kind  # noqa: B018 - the access is the test


def test_packages_of_the_project_are_fine() -> None:
    """The project itself passes its check."""
    assert packages.misplaced_package() is None
    assert packages.overwritten_package() is None


def test_packages_hidden_by_another_are_named(tmp_path: Path) -> None:
    """A package of the same name that comes first on the path is named, exit 2, before any of it is loaded."""
    (tmp_path / "exporters").mkdir()
    (tmp_path / "exporters" / "__init__.py").write_text("raise SystemExit('loaded')")
    paths = [str(tmp_path), str(ROOT)]
    code = f"import sys; sys.path[:0] = {paths}; from compressor.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code]
    ended = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    message = "the package exporters of blockpress is hidden or overwritten by another distribution"
    remedy = "install blockpress into an environment of its own, without exporters"
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [f"E-PACKAGE-SHADOWED  {message}", f"  do this: {remedy}"]
    ended = subprocess.run([*command, "run", "--json"], capture_output=True, text=True, check=False)
    error = {"id": "E-PACKAGE-SHADOWED", "message": message, "remedy": remedy, "exit_code": 2}
    assert json.loads(ended.stdout) == {"error": error}


@pytest.mark.parametrize("overwritten", [True, False])
def test_packages_overwritten_in_place_are_named(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overwritten: bool
) -> None:
    """An ``__init__.py`` that differs from what the installer recorded belongs to someone else."""

    class Recorded(metadata.PackagePath):
        """A row of the installer's record."""

        def locate(self) -> Any:
            """Where the file lies."""
            return ROOT / self

    path = Recorded("exporters/__init__.py")
    content = b"theirs" if overwritten else (ROOT / path).read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    path.hash = metadata.FileHash(f"sha256={digest}")

    class Installed:
        """A distribution with one recorded file."""

        files = (path,)

    monkeypatch.setattr(metadata, "distribution", lambda _: Installed)
    ended = terminal.run("inspect", tmp_path / "no.onnx")
    assert ended.err.startswith("E-PACKAGE-SHADOWED  the package exporters" if overwritten else "E-ONNX-")
    assert ended.code == (2 if overwritten else 3)
