"""Whole runs with an end-to-end stage: what is committed, what the report says, what is told on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors import safe_open
from torch import Tensor
from workshop import Workshop, contents

from compressor import CompressionResult, compress, end_to_end
from compressor.errors import StoppedSafely
from compressor.finetuning import FINETUNINGS
from compressor.progress import (
    BlockFinished,
    Event,
    FinetuningFinished,
    FinetuningProgress,
    Notice,
    StageStarted,
)
from exporters.masks import read_masks

QUICK = {"recovery__epochs": 2, "recovery__lr": 1e-2}
KL = {**QUICK, "finish__method": "kl", "finish__epochs": 3, "finish__lr": 1e-2, "finish__batch_size": 4}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every weight of a model folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        if path.name != "masks.safetensors":
            with safe_open(path, framework="pt") as stored:
                found.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118  # no mapping
    return found


def masks_and_zeros_agree(hf: Path) -> bool:
    """Whether the written masks say exactly what is zero."""
    tensors = tensors_of(hf)
    masks = read_masks(hf / "masks.safetensors")
    return all(np.array_equal(mask, tensors[name].numpy() != 0) for name, mask in masks.items())


def run(workshop: Workshop, out: Path, told: list[Event] | None = None, **settings: Any) -> CompressionResult:
    """A run on the tiny llama, not validated."""
    progress = (lambda event: None) if told is None else told.append
    return compress(workshop.model, out, workshop.recipe(**settings), validate=False, progress=progress)


def only_row(result: CompressionResult) -> dict[str, Any]:
    """The report's one end-to-end stage."""
    (row,) = result.report["finetuning"]
    return dict(row)


@pytest.mark.parametrize("method", FINETUNINGS)
def test_run_with_an_end_to_end_recovery_passes(workshop: Workshop, tmp_path: Path, method: str) -> None:
    """Validated file, masks that agree with the zeros, embedding and head as they came, one row in the report."""
    recipe = workshop.recipe(**QUICK, recovery__method=method)
    result = compress(workshop.model, tmp_path / "sparse.onnx", recipe)
    assert result.passed is True
    assert masks_and_zeros_agree(tmp_path / "sparse.hf")
    before, after = tensors_of(workshop.model), tensors_of(tmp_path / "sparse.hf")
    outside = [name for name in before if ".layers." not in name]
    assert outside
    assert all(torch.equal(before[name], after[name]) for name in outside)
    row = only_row(result)
    assert (row["stage"], row["method"]) == ("recovery", method)
    assert row["loss_after"] <= row["loss_before"]
    assert [block["steps"] for block in result.report["blocks"]] == [None, None]


@pytest.mark.parametrize("method", ["masked-lora", "spp", "squarehead", "norms"])
def test_run_keeps_the_pruners_masks_bit_for_bit(workshop: Workshop, tmp_path: Path, method: str) -> None:
    """The masks are those of a run without recovery."""
    (tmp_path / "without").mkdir()
    workshop.quick(tmp_path / "without" / "sparse.onnx", recovery__method="none")
    run(workshop, tmp_path / "sparse.onnx", **QUICK, recovery__method=method)
    name = "sparse.hf/masks.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_run_with_plain_lora_says_how_many_zeros_are_left(workshop: Workshop, tmp_path: Path) -> None:
    """The target stays, what is measured drops, a warning says so once, and the zeros that are left are real."""
    told: list[Event] = []
    settings = {**QUICK, "recovery__method": "lora", "recovery__selection": "last"}
    result = run(workshop, tmp_path / "sparse.onnx", told, **settings)
    facts = result.report["sparsity"]
    assert facts["target"] == 0.5
    assert 0.3 < facts["measured"] < 0.45
    (notice,) = [event for event in told if isinstance(event, Notice)]
    assert notice.shortfall
    share = f"{100 * facts['measured']:.2f} %"
    assert (
        notice.message
        == f"merging LoRA fills zeros: {share} of the pruned weights are zero now, 50.00 % were"
    )
    assert notice.message in result.report["notices"]
    assert masks_and_zeros_agree(tmp_path / "sparse.hf")


@pytest.mark.parametrize("variant", ["gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["lora", "masked-lora", "spp"])
def test_run_respects_transposed_and_fused_layouts(
    workshop: Workshop, tmp_path: Path, variant: str, method: str
) -> None:
    """GPT-2's matrices are stored the other way round, a mixture's experts in one parameter; files validate."""
    model = tiny_models.save_variant(tmp_path / "model", variant)
    recipe = workshop.recipe(**QUICK, recovery__method=method)
    result = compress(model, tmp_path / "sparse.onnx", recipe)
    assert result.passed is True
    assert only_row(result)["best_step"] > 0
    assert (result.report["sparsity"]["measured"] > 0.499) == (method != "lora")


def test_finish_lowers_the_divergence_after_any_repair(workshop: Workshop, tmp_path: Path) -> None:
    """Blocks are repaired one by one, then tuned together; both are in the report, the file validates."""
    recipe = workshop.recipe(**KL)
    result = compress(workshop.model, tmp_path / "sparse.onnx", recipe)
    assert result.passed is True
    assert all(block["steps"] == 6 for block in result.report["blocks"])
    row = only_row(result)
    assert (row["stage"], row["method"], row["loss"]) == ("finish", "kl", "kl + 2 squarehead")
    assert row["loss_after"] < row["loss_before"]
    assert row["calibration_last"] < row["calibration_first"]
    assert result.report["timings"]["blocks: kl"] == row["seconds"]
    assert masks_and_zeros_agree(tmp_path / "sparse.hf")


def test_finish_follows_an_end_to_end_recovery(workshop: Workshop, tmp_path: Path) -> None:
    """After plain LoRA it trains what LoRA left: more weights than the pruner kept."""
    lora = {**KL, "recovery__method": "lora", "recovery__selection": "last"}
    result = run(workshop, tmp_path / "sparse.onnx", **lora)
    first, second = result.report["finetuning"]
    assert (first["method"], second["method"]) == ("lora", "kl")
    pruned = run(workshop, tmp_path / "other.onnx", **KL, recovery__method="none")
    assert second["trained_parameters"] > only_row(pruned)["trained_parameters"]
    assert result.report["sparsity"]["measured"] < 0.45


def test_equal_runs_with_a_finish_give_equal_files(workshop: Workshop, tmp_path: Path) -> None:
    """Every model file is the same to the byte; of the report only seconds differ."""
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        results.append(run(workshop, tmp_path / name / "sparse.onnx", **KL))
    first, second = (contents(tmp_path / name) for name in ("one", "two"))
    reports = {"sparse.report.json", "sparse.report.html"}
    assert {name for name in first if first[name] != second[name]} <= reports
    rows = [{**only_row(result), "seconds": None} for result in results]
    assert rows[0] == rows[1]


def test_events_tell_the_stage_after_the_blocks(workshop: Workshop, tmp_path: Path) -> None:
    """All blocks first, then the stage by name, each of its steps, its losses; then the export."""
    told: list[Event] = []
    run(workshop, tmp_path / "sparse.onnx", told, **KL)
    kinds = [type(event) for event in told]
    steps = [event for event in told if isinstance(event, FinetuningProgress)]
    assert [event.step for event in steps] == list(range(1, 10))
    assert {(event.stage, event.steps, event.lr, event.trial) for event in steps} == {
        ("finish", 9, 1e-2, False)
    }
    assert kinds.index(FinetuningFinished) > kinds.index(FinetuningProgress) > kinds.index(BlockFinished)
    stages = [event.name for event in told if isinstance(event, StageStarted)]
    assert stages == ["open", "finish", "export", "publish"]


def test_stop_in_the_finish_leaves_the_blocks_to_go_on_with(workshop: Workshop, tmp_path: Path) -> None:
    """A run that is stopped between two steps publishes nothing; the next one does the finish, not the blocks."""
    told: list[Event] = []

    def stop() -> bool:
        return any(isinstance(event, FinetuningProgress) and event.step == 2 for event in told)

    with pytest.raises(StoppedSafely, match="stopped in the finish after step 2 of 9") as stopped:
        compress(
            workshop.model,
            tmp_path / "sparse.onnx",
            workshop.recipe(**KL),
            validate=False,
            stop=stop,
            progress=told.append,
        )
    assert stopped.value.exit_code == 75
    assert [path.name for path in tmp_path.iterdir()] == [".sparse.onnx.state"]
    again: list[Event] = []
    run(workshop, tmp_path / "sparse.onnx", again, **KL)
    assert not any(isinstance(event, BlockFinished) for event in again)
    assert sum(isinstance(event, FinetuningProgress) for event in again) == 9
    assert not (tmp_path / ".sparse.onnx.state").exists()


@pytest.mark.parametrize(("free_bytes", "stages"), [(2**40, ["kl"]), (0, [])])
def test_auto_finish_is_decided_and_reported(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, stages: list[str]
) -> None:
    """The recipe in the report says what was taken, a notice says why."""
    monkeypatch.setattr(end_to_end, "available_memory_bytes", lambda: free_bytes)
    result = run(workshop, tmp_path / "sparse.onnx", **{**KL, "finish__method": "auto"})
    assert [row["method"] for row in result.report["finetuning"]] == stages
    assert result.report["recipe"]["finish"]["method"] == (stages or ["none"])[0]
    assert any("the whole model needs about" in notice for notice in result.report["notices"])


def test_report_of_a_run_without_such_a_stage_has_none(workshop: Workshop) -> None:
    """Blocks are committed one by one as ever, with how many weights were trained."""
    report = json.loads(workshop.file_output.report_path.read_text(encoding="utf-8"))
    assert report["finetuning"] == []
    assert all(block["trained_parameters"] > 0 for block in report["blocks"])
