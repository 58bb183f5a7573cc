"""The files that a user or another tool hands to the program, and what reads each of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from faults.interrupted_runs import tiny_run

from compressor.calibration.tokens import refuse_tokenizer_beyond
from compressor.models.checkpoint import open_checkpoint
from compressor.models.source import open_source
from compressor.recipe_file import read_recipe
from compressor.report.schema import read_report
from compressor.run.state import StateFolder
from exporters.inspect import inspect_model
from exporters.manifest import check_files, read_manifest

RECIPES = Path(__file__).resolve().parents[2] / "compressor" / "recipes"


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        path: The file, relative to the folder of the samples.
        kind: How it is mutated.
        read: Reads the folder of the samples; refuses by ReportedError, and by nothing else.
    """

    path: str
    kind: str
    read: Callable[[Path], None]


def _model(folder: Path) -> None:
    source = open_source(open_checkpoint(folder / "model"), torch.device("cpu"))
    source.load_block(0)
    source.close()


def _tokenizer(folder: Path) -> None:
    tokenizer = open_checkpoint(folder / "model").load_tokenizer()
    refuse_tokenizer_beyond(tokenizer, 128)
    tokenizer("anna finds the red boat")


def _recipe(folder: Path) -> None:
    read_recipe(folder / "recipe.yaml")


def _manifest(folder: Path) -> None:
    check_files(read_manifest(folder / "out" / "sparse.manifest.json"), folder / "out")


def _onnx(folder: Path) -> None:
    changed = check_files(read_manifest(folder / "out" / "sparse.manifest.json"), folder / "out")
    whole = (folder / "out" / "sparse.onnx").read_bytes() == (folder / "whole.onnx").read_bytes()
    assert bool(changed) is not whole, "a changed byte of the model file is not seen"
    inspect_model(folder / "out" / "sparse.onnx")


def _state(folder: Path) -> None:
    for commit in StateFolder(folder / "state").commits():
        assert commit is None or commit.content["windows"] in (1, 2), (
            "an altered commit is taken for a whole one"
        )


def _report(folder: Path) -> None:
    read_report(folder / "out" / "sparse.report.json")


FORMATS = {
    "safetensors": Format("model/model.safetensors", "binary", _model),
    "config": Format("model/config.json", "json", _model),
    "tokenizer": Format("model/tokenizer.json", "json", _tokenizer),
    "recipe": Format("recipe.yaml", "yaml", _recipe),
    "manifest": Format("out/sparse.manifest.json", "json", _manifest),
    "onnx": Format("out/sparse.onnx", "binary", _onnx),
    "state": Format("state/00002.json", "json", _state),
    "report": Format("out/sparse.report.json", "json", _report),
}


def make_samples(folder: Path) -> Path:
    """One right file of each format, in a folder, made by the program itself."""
    from compressor.cli import main
    from compressor.run.output import name_output

    work = folder / "work"
    work.mkdir(parents=True)
    run = tiny_run(work)
    samples = folder / "samples"
    (samples / "out").mkdir(parents=True)
    out = samples / "out" / "sparse.onnx"
    if main(run.argv(out)):
        raise RuntimeError("the sample could not be made")
    stopped = work / "stopped.onnx"
    _stop_after_two_windows(run.argv(stopped))
    shutil.copytree(name_output(stopped).state, samples / "state")
    shutil.copytree(run.model, samples / "model")
    shutil.copyfile(out, samples / "whole.onnx")
    shutil.copyfile(RECIPES / "default.yaml", samples / "recipe.yaml")
    for text in work.glob("*.jsonl"):
        shutil.copy(text, samples)
    (samples / "argv.json").write_text(json.dumps(run.argv(Path("new.onnx"))), encoding="utf-8")
    return samples


def _stop_after_two_windows(argv: list[str]) -> None:
    import os

    from compressor.cli import main

    os.environ["BLOCKPRESS_FAULT"] = "blocks: before a window#2:interrupt"
    try:
        code = main(argv)
    except SystemExit as leaving:
        code = leaving.code
    finally:
        del os.environ["BLOCKPRESS_FAULT"]
    if code != 75:
        raise RuntimeError(f"the run was to stop with 75, not {code}")
