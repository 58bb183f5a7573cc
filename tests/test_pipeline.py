"""A whole run on a tiny llama: what it leaves behind and what it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import architectures
import numpy as np
import pytest
import tiny_models
import torch
from safetensors.numpy import load_file
from workshop import FILE_PRODUCTS, Workshop, contents, names_in

from compressor import compress, export
from compressor.progress import BlockFinished, Event, Notice, RunStarted, StageStarted, TextReady
from compressor.report.schema import read_report
from compressor.validation import validate_export
from compressor.validation_report import validation_document
from exporters.errors import ReportedError
from exporters.manifest import read_manifest
from exporters.masks import read_masks
from exporters.read import read_model


def zeros_of(onnx_path: Path) -> dict[str, np.ndarray]:
    """Where each constant of two dimensions is zero."""
    return {
        tensor.name: ~tensor.nonzero()
        for tensor in read_model(onnx_path).tensors
        if tensor.name.endswith("weight") and len(tensor.shape) == 2
    }


# What a run leaves behind


def test_pipeline_file_output_leaves_six_products_and_nothing_else(workshop: Workshop) -> None:
    """`--out sparse.onnx` leaves the six products beside each other; no staging folder, no lock, no log."""
    result = workshop.file_output
    assert result.passed is True
    assert names_in(result.out.parent) == FILE_PRODUCTS
    hf = names_in(result.out.parent / "sparse.hf")
    assert {"config.json", "tokenizer.json", "masks.safetensors", "LICENSE", "chat_template.jinja"} <= hf


def test_pipeline_folder_output_has_what_a_loader_needs_and_nothing_else(workshop: Workshop) -> None:
    """`--out folder` leaves model, manifest, reports, masks, config and the tokenizer's files."""
    result = workshop.folder_output
    assert result.passed is True
    assert result.out == workshop.root / "folder" / "model.onnx"
    copied = names_in(workshop.model) - {"model.safetensors"}
    own = {f"model.{end}" for end in ("onnx", "onnx.data", "manifest.json", "report.json", "report.html")}
    assert names_in(workshop.root / "folder") == own | copied | {"model.masks.safetensors"}


def test_pipeline_folder_output_copies_the_models_files_verbatim(workshop: Workshop) -> None:
    """Tokenizer, chat template, licence and generation config are the same bytes; config.json may state a dtype."""
    before, after = contents(workshop.model), contents(workshop.folder_output.out.parent)
    same = {name for name, digest in before.items() if after.get(name) == digest}
    assert {"tokenizer.json", "generation_config.json", "LICENSE", "chat_template.jinja"} <= same
    assert before.keys() - same <= {"config.json", "model.safetensors"}


def test_pipeline_equal_runs_give_equal_bytes(workshop: Workshop, tmp_path: Path) -> None:
    """A second run gives the same model files, `.hf` and manifest; of the report only what is timed differs."""
    first = workshop.file_output
    second = compress(workshop.model, tmp_path / "sparse.onnx", workshop.recipe(), validate=False)
    old, new = contents(first.out.parent), contents(tmp_path)
    assert old.keys() == new.keys()
    assert {name for name in old if old[name] != new[name]} <= {"sparse.report.json", "sparse.report.html"}
    for key in ("sparsity", "size", "weights", "recipe", "manifest", "calibration", "learning_rate"):
        assert first.report[key] == second.report[key], key
    without_time = [
        [{**row, "seconds": None} for row in result.report["blocks"]] for result in (first, second)
    ]
    assert without_time[0] == without_time[1]


def test_pipeline_onnx_carries_where_it_came_from(workshop: Workshop) -> None:
    """`metadata_props` name source, revision, recipe hash, version, sparsity and pattern."""
    metadata = read_model(workshop.file_output.out).metadata
    assert metadata["blockpress.source"] == "model"
    assert metadata["blockpress.revision"] == ""
    assert metadata["blockpress.recipe_sha256"] == workshop.recipe().digest()
    assert metadata["blockpress.sparsity"] == "0.5"
    assert metadata["blockpress.pattern"] == ""
    assert metadata["blockpress.version"]


def test_pipeline_files_name_no_folder_of_this_machine(workshop: Workshop) -> None:
    """No product holds the absolute path of model, texts or output."""
    folder = workshop.file_output.out.parent
    holders = [path for path in folder.rglob("*") if path.is_file()]
    assert len(holders) > len(FILE_PRODUCTS)
    needle = str(workshop.root).encode()
    assert [path.name for path in holders if needle in path.read_bytes()] == []


def test_pipeline_manifest_covers_every_model_file(workshop: Workshop) -> None:
    """The manifest lists ONNX, data and every file of `.hf`; the report names it by its digest."""
    result = workshop.file_output
    manifest = read_manifest(result.out.with_name("sparse.manifest.json"))
    reports = {"sparse.report.json", "sparse.report.html", "sparse.manifest.json"}
    assert {row.name for row in manifest.files} == contents(result.out.parent).keys() - reports
    assert result.report["manifest"]["digest"] == manifest.digest


# What the report says


def test_pipeline_report_is_the_result(workshop: Workshop) -> None:
    """The report on the disk is the one in the result, and holds the keys that pipelines read."""
    result = workshop.file_output
    assert read_report(result.report_path).tree() == result.report
    assert result.html_path.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    report = result.report
    assert report["sparsity"] == {"target": 0.5, "measured": 0.5, "pattern": None, "structured": False}
    assert all(report["perplexity"][key] > 1 for key in ("dense", "pruned", "recovered", "onnx"))
    assert report["size"]["source_bytes"] == (workshop.model / "model.safetensors").stat().st_size
    assert report["size"]["dense_bytes"] == 4 * unique_parameters(workshop.model)
    onnx_bytes = sum(path.stat().st_size for path in (result.out, result.out.with_name("sparse.onnx.data")))
    assert report["size"]["onnx_bytes"] == onnx_bytes
    for key in ("recipe", "versions", "timings", "peak_memory_bytes", "schema_version"):
        assert report[key], key


def unique_parameters(model: Path) -> int:
    """How many weights the file holds; tied ones stand in it once."""
    return sum(tensor.size for tensor in load_file(model / "model.safetensors").values())


def test_pipeline_without_repair_and_validation_keeps_the_keys(workshop: Workshop, tmp_path: Path) -> None:
    """With `--recovery none` recovered equals pruned; with `--no-validate` ONNX and the verdict are null."""
    result = workshop.quick(tmp_path / "sparse.onnx", recovery__method="none")
    perplexity = result.report["perplexity"]
    assert perplexity["recovered"] == perplexity["pruned"] != perplexity["dense"]
    assert perplexity["onnx"] is None
    assert result.report["validation"]["passed"] is None
    assert result.report["validation"]["checks"] == []
    assert result.passed is None
    losses = [(row["loss_before"], row["loss_after"]) for row in result.report["blocks"]]
    assert losses == [(None, None)] * 2


def test_pipeline_events_tell_the_run_from_start_to_end(workshop: Workshop) -> None:
    """Texts, plan, one line per block and the stages come in order."""
    assert workshop.file_output.passed
    told = [event for event in workshop.events if isinstance(event, (RunStarted, TextReady, BlockFinished))]
    assert [type(event) for event in told] == [RunStarted, TextReady, TextReady, BlockFinished, BlockFinished]
    stages = [event.name for event in workshop.events if isinstance(event, StageStarted)]
    assert stages == ["open", "export", "validate", "publish"]


def test_pipeline_events_and_notices_tell_of_a_shortfall_once(workshop: Workshop, tmp_path: Path) -> None:
    """A share rounded down to whole weights is told as a shortfall; no event holds a figure that was not measured."""
    events: list[Event] = []
    recipe = workshop.recipe(recovery__method="none", pruning__sparsity=0.51)
    result = compress(
        workshop.model, tmp_path / "sparse.onnx", recipe, validate=False, progress=events.append
    )
    (told,) = [event.message for event in events if isinstance(event, Notice) and event.shortfall]
    assert "are zero, not 51 %" in told
    assert result.report["notices"].count(told) == 1
    blocks = [event for event in events if isinstance(event, BlockFinished)]
    assert [(event.loss_before, event.loss_after) for event in blocks] == [(None, None)] * 2


def test_pipeline_prints_nothing_and_leaves_the_random_state(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A library call writes to no terminal and moves no global generator."""
    before = torch.get_rng_state()
    workshop.quick(tmp_path / "sparse.onnx", recovery__method="none")
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


# Pruning and repair


def test_pipeline_repair_makes_blocks_better(workshop: Workshop) -> None:
    """Each block's held-out loss is smaller after the repair, and a step was selected."""
    for row in workshop.file_output.report["blocks"]:
        assert row["loss_after"] < row["loss_before"]
        assert row["best_step"] > 0


def test_pipeline_repair_never_makes_a_block_worse(workshop: Workshop, tmp_path: Path) -> None:
    """A learning rate that ruins every step leaves the blocks as they were pruned."""
    result = workshop.quick(tmp_path / "sparse.onnx", recovery__lr=100.0)
    for row in result.report["blocks"]:
        assert row["best_step"] == 0
        assert row["loss_after"] == row["loss_before"]
    assert result.report["perplexity"]["recovered"] == result.report["perplexity"]["pruned"]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pipeline_pruners_meet_the_sparsity_exactly(workshop: Workshop, tmp_path: Path, method: str) -> None:
    """floor(n · s) zeros: n is a row for Wanda, the matrix for magnitude and, up to 128 columns wide, SparseGPT."""
    settings = {"pruning__method": method, "pruning__sparsity": 0.7, "recovery__method": "none"}
    result = workshop.quick(tmp_path / "sparse.onnx", **settings)
    masks = read_masks(tmp_path / "sparse.hf" / "masks.safetensors")
    assert len(masks) == 14
    for name, mask in masks.items():
        rows, columns = mask.shape
        expected = rows * int(columns * 0.7) if method == "wanda" else int(rows * columns * 0.7)
        assert int((~mask).sum()) == expected, name
    assert result.report["sparsity"]["measured"] == pytest.approx(
        0.7, abs=0.025
    )  # a row's floor costs < 1 / 40


def test_pipeline_names_an_expert_that_saw_no_token(workshop: Workshop, tmp_path: Path) -> None:
    """Experts that the router never chooses fall back to magnitude, and the report says which."""
    model = architectures.build("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        for name, router in model.named_parameters():
            if name.endswith("gate.weight"):  # x·v or -x·v is positive, so that expert 0 or 1 always wins
                router[1], router[2], router[3] = -router[0], 0.0, 0.0
    folder = tiny_models.save_model(tmp_path / "moe", model)
    events: list[Event] = []
    recipe = workshop.recipe(recovery__method="none")
    result = compress(folder, tmp_path / "sparse.onnx", recipe, validate=False, progress=events.append)
    named = [notice for notice in result.report["notices"] if "saw no calibration token" in notice]
    assert "block 0, mlp.experts.gate_up_proj[2]: saw no calibration token; pruned by magnitude" in named
    assert len(named) == 2 * 2 * 2  # blocks, experts, matrices of an expert
    told = [event.message for event in events if isinstance(event, Notice)]
    assert sum("saw no calibration token" in message for message in told) == len(named)


# Export without pruning


def test_pipeline_export_of_a_dense_model_masks_nothing(workshop: Workshop, tmp_path: Path) -> None:
    """A dense baseline is exported dense, and validates."""
    result = export(workshop.model, tmp_path / "dense.onnx", workshop.recipe())
    assert result.passed is True
    assert result.report["sparsity"] == {
        "target": None,
        "measured": 0.0,
        "pattern": None,
        "structured": False,
    }
    assert read_masks(tmp_path / "dense.hf" / "masks.safetensors") == {}
    assert set(result.report["size"]["by_encoding"]) == {"dense"}
    assert not any(zeros.any() for zeros in zeros_of(result.out).values())


def test_pipeline_export_of_a_pruned_model_keeps_its_zeros(workshop: Workshop, tmp_path: Path) -> None:
    """The zeros of a model that was pruned before are found, masked, and stand in the export."""
    pruned = workshop.file_output
    result = export(pruned.out.with_name("sparse.hf"), tmp_path / "again.onnx", workshop.recipe())
    assert result.passed is True
    assert result.report["sparsity"]["measured"] == 0.5
    before, after = zeros_of(pruned.out), zeros_of(result.out)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert sum(int(zeros.sum()) for zeros in after.values()) > 0
    assert result.report["perplexity"]["recovered"] == pytest.approx(
        pruned.report["perplexity"]["recovered"],
        rel=1e-6,  # the same weights, through another path's rounding
    )


# Validation of what lies on the disk


def test_pipeline_output_validates_again(workshop: Workshop) -> None:
    """The published files pass once more, on the windows of the report, against the sibling `.hf`."""
    result = workshop.file_output
    again = validate_export(result.out, evaluation=workshop.recipe().evaluation)
    assert again.report.passed
    assert again.reference == result.out.with_name("sparse.hf")
    assert again.report.perplexity["onnx"] == result.report["perplexity"]["onnx"]
    assert again.report.perplexity["dense"] == result.report["perplexity"]["dense"]


def test_pipeline_report_of_a_validation_states_the_same_facts(workshop: Workshop) -> None:
    """Where run and validation know the same, they say the same: sizes, manifest, model, what loading means."""
    result = workshop.file_output
    document = validation_document(validate_export(result.out, structure_only=True)).tree()
    for key in ("model", "sparsity", "size", "manifest"):
        assert document[key] == result.report[key], key
    assert document["load"]["note"] == result.report["load"]["note"]
    assert document["size"]["by_encoding"]["sparse"]["tensors"] > 0


def test_pipeline_folder_output_validates_its_masks_and_skips_parity(workshop: Workshop) -> None:
    """Without a reference model masks and perplexity are still compared; parity is skipped, not passed."""
    again = validate_export(workshop.folder_output.out.parent, evaluation=workshop.recipe().evaluation)
    status = {check.name: check.status for check in again.report.checks}
    assert again.report.passed
    assert status["masks"] == status["perplexity-drift"] == "passed"
    assert status["parity-prefill"] == "skipped"


def test_pipeline_altered_data_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    """One changed byte of the external data is an altered file, exit code 3, before anything is run."""
    shutil.copytree(workshop.file_output.out.parent, tmp_path / "copy")
    data = tmp_path / "copy" / "sparse.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ReportedError, match=r"sparse\.onnx\.data: altered") as refusal:
        validate_export(tmp_path / "copy" / "sparse.onnx", structure_only=True)
    assert refusal.value.exit_code == 3
    assert refusal.value.error_id == "E-MANIFEST-MISMATCH"


def test_pipeline_failed_gate_is_a_verdict_and_the_output_is_whole(
    workshop: Workshop, tmp_path: Path
) -> None:
    """A gate that fails raises nothing: the report says which, and every product is there."""
    recipe = workshop.recipe(gates__min_sparsity=0.9, recovery__method="none")
    result = compress(workshop.model, tmp_path / "sparse.onnx", recipe)
    assert result.passed is False
    failed = [row["name"] for row in result.report["validation"]["checks"] if row["status"] == "failed"]
    assert failed == ["sparsity"]
    assert names_in(tmp_path) == FILE_PRODUCTS
