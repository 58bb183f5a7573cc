"""Nothing in a model, a recipe, a grid or an ONNX file is run, and no name in one is taken for more than a name."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from bad_bench import check_text, open_bench
from bad_inputs import WEIGHTS, Bench
from cli_fakes import Terminal, TerminalStream
from compare_samples import cell, figures, sample_comparison
from onnx import helper
from traps import PICKLES, TAGS, assert_traps_work, native_library, raw_pickle, set_traps
from workshop import Workshop

from compressor.cli.displays import LiveDisplay, PlainDisplay
from compressor.cli.terminal import json_text, printable
from compressor.comparison.csv_rows import csv_text
from compressor.comparison.markdown import markdown_text
from compressor.progress import CellFinished, CellProgress, Event, Notice, RunStarted, StageStarted, TextReady

ROOT = Path(__file__).parents[1]
# As the installed script does, Python looks for modules beside this file, not in the current folder.
SCRIPT = "import sys\nsys.path.append({root!r})\nfrom compressor.cli import main\nsys.exit(main())\n"
CURSOR = ("\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "\r", "\x08", "\x7f", "\u202e", "\u2066")


@pytest.fixture
def bench(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A model, two texts and an older output."""
    return open_bench(workshop, tmp_path, monkeypatch)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that whatever is run would make."""
    return tmp_path / "canary"


def test_canary_in_a_models_folder_is_not_run(bench: Bench, canary: Path, tmp_path: Path) -> None:
    """A run with the trapped folder as the current one, its validation in a child too, passes and runs nothing of it.

    The folder's name is markup and moves the cursor; it comes out spelled, in the page as text.
    """
    name = "<script>open('x')<!--\x1b[2J"
    model = bench.model.rename(bench.home / name.replace("/", ""))
    set_traps(model, canary)
    assert_traps_work(model, canary)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "compress.py"
    script.write_text(SCRIPT.format(root=str(ROOT)), encoding="utf-8")
    texts = [
        "--calibration",
        bench.home / "calibration.jsonl",
        "--eval-data",
        bench.home / "evaluation.jsonl",
    ]
    sizes = [
        "--num-calibration-samples",
        "4",
        "--seqlen",
        "16",
        "--max-eval-windows",
        "2",
        "--recovery",
        "none",
    ]
    ended = subprocess.run(
        [
            sys.executable,
            str(script),
            "run",
            ".",
            "--out",
            str(tmp_path / "new.onnx"),
            *map(str, texts),
            *sizes,
        ],
        cwd=model,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert not canary.exists()
    assert "auto_map" in ended.stderr
    assert "\x1b" not in ended.stderr + ended.stdout
    assert "<script" not in (tmp_path / "new.report.html").read_text(encoding="utf-8")
    assert {path.suffix for path in (tmp_path / "new.hf").iterdir()} <= {
        "",
        ".json",
        ".jinja",
        ".safetensors",
    }


@pytest.mark.parametrize("name", PICKLES[:4])
def test_canary_in_pickled_weights_is_not_run(
    capsys: pytest.CaptureFixture[str], bench: Bench, canary: Path, name: str
) -> None:
    """A folder of pickles is refused unread, also where a pickle bears the name of a safetensors file."""
    for place, refusal in ((name, "E-MODEL-PICKLE"), (WEIGHTS, "E-WEIGHTS-HEADER")):
        (bench.model / WEIGHTS).unlink(missing_ok=True)
        (bench.model / place).write_bytes(raw_pickle(canary))
        ended = Terminal(capsys).run("run", bench.model, "--out", bench.out, "--force", "-q")
        check_text(ended, (refusal, 3), place)
        (bench.model / place).unlink()
    assert not canary.exists()


@pytest.mark.parametrize("architecture", ["mine", "llama"])
def test_canary_in_a_models_own_code_is_not_run(
    capsys: pytest.CaptureFixture[str], bench: Bench, canary: Path, architecture: str
) -> None:
    """Without --trust-remote-code a model that needs its own code is refused, and so is its tokenizer."""
    set_traps(bench.model, canary)
    path = bench.model / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "model_type": architecture}), encoding="utf-8")
    (bench.model / "tokenizer.json").unlink()
    ended = Terminal(capsys).run("run", bench.model, "--out", bench.out, "--force", "-q")
    refusal = "E-MODEL-REMOTE-CODE" if architecture == "mine" else "E-TOKENIZER-NOT-FOUND"
    assert (ended.err.split("  ")[0], ended.code) == (refusal, 3)
    assert not canary.exists()


@pytest.mark.parametrize("tag", TAGS)
def test_canary_in_a_tag_is_not_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path, tag: str
) -> None:
    """Tags are refused wherever YAML is read: recipes, grids, --set."""
    filled = tag.format(canary=canary)
    (tmp_path / "r.yaml").write_text(f"seed: {filled}\n", encoding="utf-8")
    (tmp_path / "g.yaml").write_text(f"set: {filled}\n", encoding="utf-8")
    for words in (
        ("run", "model", "--recipe", tmp_path / "r.yaml"),
        ("compare", "model", "--grid", tmp_path / "g.yaml"),
        ("run", "model", "--set", f"seed={filled}"),
    ):
        ended = Terminal(capsys).run(*words, "--out", tmp_path / "new", "-q")
        assert (ended.code, "SYNTAX" in ended.err) == (2, True)
    assert not canary.exists()


def test_canary_in_an_onnx_file_is_not_loaded(
    capsys: pytest.CaptureFixture[str], bench: Bench, canary: Path
) -> None:
    """A library that a graph names, in an attribute or in its metadata, is not loaded by validate or inspect."""
    library = native_library(bench.out.parent, canary)
    if library is None:
        pytest.skip("no C compiler")
    for domain, operator in (("evil", "Custom"), ("com.microsoft", "PyOp"), ("com.microsoft", "EPContext")):
        model = onnx.load(bench.out, load_external_data=False)
        named = {"library": library.name, "module": "evil", "ep_cache_context": library.name, "embed_mode": 0}
        model.graph.node.append(helper.make_node(operator, [], ["extra"], domain=domain, **named))
        if domain == "evil":
            model.opset_import.append(helper.make_opsetid(domain, 1))
        for key in ("session.custom_ops", "ort_config", "custom_op_library"):
            model.metadata_props.add(key=key, value=str(library))
        (bench.out.parent / "evil.onnx").write_bytes(model.SerializeToString())
        Terminal(capsys).run("inspect", bench.out.parent / "evil.onnx")
        assert not canary.exists()
    ended = Terminal(capsys).run("validate", bench.out.parent / "evil.onnx", "--structure-only", "-q")
    assert ended.code == 3, ended.err
    assert not canary.exists()


def events(name: str) -> tuple[Event, ...]:
    """Every event that carries a name from outside."""
    return (
        StageStarted("open", name),
        RunStarted(name, name, 2, 800_000, "bfloat16", "float16", "cpu", "0.5", "wanda", "ebft"),
        TextReady("calibration", name, 112, 256, 16),
        CellProgress(1, 2, name, name),
        CellFinished(1, 2, name, 1.0, error_id="E-X", error=name),
        Notice(name),
        Notice(name, shortfall=True),
    )


@pytest.mark.parametrize("signs", CURSOR, ids=ascii)
def test_names_move_no_cursor(monkeypatch: pytest.MonkeyPatch, signs: str) -> None:
    """What moves a cursor, sets a title or turns the writing round is spelled out, on terminals and in JSON."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    plain, live = TerminalStream(), TerminalStream()
    for display in (PlainDisplay(plain), LiveDisplay(live)):
        for event in events(f"a{signs}b[bold]c"):
            display.show(event)
        display.close()
    spelled = printable(signs)
    assert spelled.isprintable()
    assert f"a{signs}" not in plain.getvalue() + live.getvalue()
    assert f"a{spelled}b[bold]c" in plain.getvalue()
    assert f"a{spelled}b[bold]c" in live.getvalue()
    document = json_text({"name": f"a{signs}b", "list": [1, "ü€😀"]})
    assert json.loads(document) == {"name": f"a{signs}b", "list": [1, "ü€😀"]}
    assert document.replace("\n", "").isprintable()
    assert "ü€😀" in document


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1+1", "@SUM(A1)", "|cmd", " =1", "\t=1", "\n=1"])
def test_names_are_no_formulas(name: str) -> None:
    """A spreadsheet computes what begins like a formula: such a name comes with an apostrophe before it."""
    made = cell("wanda", "0.5", "ebft", figures(20.0, 10.0, recovery_s=1.0), variant=name)
    (row,) = csv.DictReader(io.StringIO(csv_text(sample_comparison(cells=(made,)))))
    assert row["variant"] == f"'{name}"
    assert row["pruner"] == "wanda"
    assert float(row["perplexity_recovered"]) == 10.0


def test_names_are_no_markup_in_markdown() -> None:
    """Markup and line ends in a table's or variant's name do not get into the Markdown as such."""
    evil = "<img src=x onerror=alert(1)>\n# title"
    made = cell("wanda", "0.5", "ebft", figures(20.0, 10.0, recovery_s=1.0), variant=evil, table=evil)
    text = markdown_text(sample_comparison(cells=(made,)))
    assert "<img" not in text
    assert "\n# title" not in text
