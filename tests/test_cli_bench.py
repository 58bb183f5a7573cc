"""``compress bench``: a tiny model against the rivals that are made from it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fakes import Terminal
from onnx_samples import pruned_matrix, weight_of, write_product
from speed_samples import language_model, packed_product
from workshop import Workshop, names_in

from compressor.cli.bench import FORMS
from exporters.read import read_model
from validators.errors import ValidationError
from validators.speed.contents import contents_of
from validators.speed.process import WorkerProcess

QUICK = ("--rounds", "2", "--loads", "1", "--threads", "1", "--prompt-tokens", "5", "--decode-tokens", "3")


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """Runs command lines."""
    return Terminal(capsys)


def rounds_of(model: dict[str, Any]) -> list[int]:
    """Measured values behind each figure of a model."""
    return [
        batch[kind]["count"]
        for batch in model["batches"]
        for kind in ("decode_tokens_per_s", "first_token_s")
    ]


def test_cli_bench_measures_an_export_against_its_rivals(
    terminal: Terminal, workshop: Workshop, tmp_path: Path
) -> None:
    """Float32, int8 and 4-bit are made, kept, and measured beside the model: JSON and page have all four."""
    page, kept = tmp_path / "page.html", tmp_path / "kept"
    batches = ("--batch", "1", "--batch", "2")
    path = workshop.file_output.out
    ended = terminal.run("bench", path, *QUICK, *batches, "--keep-baselines", kept, "--html", page, "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    models = {model["name"]: model for model in document["models"]}
    assert list(models) == ["sparse-initializers", "dense-float32", "dense-int8", "dense-int4"]
    assert [model["baseline"] for model in models.values()] == [False, True, True, True]
    for model in models.values():
        assert min(model[key] for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "load_s")) > 0
        assert model["file_bytes"] > 0
        assert rounds_of(model) == [2, 2, 2, 2]
    assert set(models["sparse-initializers"]["batches"][1]["decode_ratio"]) == set(list(models)[1:])
    sizes = [models[name]["weight_bytes_per_step"] for name in list(models)[1:]]
    assert sizes == sorted(sizes, reverse=True)
    assert models["sparse-initializers"]["weight_bytes_per_step"] == pytest.approx(sizes[0], rel=0.01)
    assert document["bandwidth_bytes_per_s"]["count"] == 4
    assert document["machine"]["cores"] >= 1
    assert any("expands sparse initializers" in notice for notice in document["notices"])
    assert page.read_text(encoding="utf-8").count("<svg") in (
        5,
        6,
    )  # memory is not drawn where it is not told
    assert names_in(kept) == {f"sparse.{form}.onnx{end}" for form in FORMS for end in ("", ".data")}
    products = contents_of(read_model(path)).products
    for form in ("int8", "int4"):
        made = contents_of(read_model(kept / f"sparse.{form}.onnx"))
        assert (made.form, made.float_products, made.products) == (f"dense-{form}", 0, products)


def test_cli_bench_prints_tables(terminal: Terminal, tmp_path: Path) -> None:
    """Given rivals are measured under their names, none is made, and packed weights run by the file's own function."""
    packed = language_model(tmp_path / "packed.onnx", activation_bits=8)
    rival = language_model(tmp_path / "rival.onnx")
    ended = terminal.run("bench", packed, "--baseline", f"rival={rival}", "--make", "none", *QUICK, "-q")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "decoding, batch 1"
    assert lines[1].split()[-2:] == ["/", "rival"]
    assert [line.split()[0] for line in lines[2:4]] == ["sparse-int8", "rival"]
    assert lines[2].endswith("×")
    assert "prefill, batch 1" in lines
    assert "size and memory" in lines
    assert not any(line.startswith("note ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "error_id", "code"),
    [
        (("no.onnx",), "E-ONNX-NOT-FOUND", 3),
        (("product/model.onnx", "--make", "none"), "E-VALIDATE-SIGNATURE", 3),
        (("uncached.onnx", "--make", "none"), "E-BENCH-NO-CACHE", 3),
        (("packed.onnx", "--make", "none", "--require-library"), "E-BENCH-LIBRARY", 5),
        (("a=product/model.onnx", "a=product/model.onnx"), "E-BENCH-NAME", 2),
        (("product/model.onnx", "--rounds", "0"), "E-BENCH-WORKLOAD", 2),
        (("product/model.onnx", "--make", "int3"), "E-USAGE", 2),
        (("product/model.onnx", "--html", "nowhere/page.html"), "E-OUTPUT-PARENT", 6),
    ],
)
def test_cli_bench_refuses(
    terminal: Terminal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    error_id: str,
    code: int,
) -> None:
    """Each refusal has its id and exit code, in words and as JSON, before anything is measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blockpress_runtime.py").write_text("raise ImportError('it is not built')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)  # hides one that is installed
    (tmp_path / "product").mkdir()
    write_product(tmp_path / "product", [weight_of("weight", pruned_matrix((8, 8), 0.5))])
    packed_product(tmp_path / "packed.onnx", np.ones((4, 8), np.float32), np.zeros(1, np.float32))
    language_model(tmp_path / "uncached.onnx", cache=False)
    ended = terminal.run("bench", *arguments, "--json")
    failure = json.loads(ended.out)["error"]
    assert (failure["id"], failure["exit_code"], ended.code) == (error_id, code, code)


def test_worker_that_dies_is_told_from_one_that_refuses() -> None:
    """A process that native code took down gives an error with the model's name, and no answer is waited for."""
    with WorkerProcess("some model") as worker:
        worker._process.terminate()
        worker._process.wait()
        with pytest.raises(ValidationError) as refusal:
            worker.ask("read")
    assert refusal.value.error_id == "E-BENCH-CRASHED"
    assert refusal.value.message.startswith("some model: ")
