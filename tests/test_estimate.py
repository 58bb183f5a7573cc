"""What a run is said to take: near what it takes, larger for more, refused where it is not there, nothing written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from workshop import Workshop, contents

from compressor.cli import main
from compressor.dry_run import estimate_run
from compressor.errors import OutOfResources
from compressor.estimating import FACTOR, Estimate, disk, estimate, memory, refuse_misfits, step
from compressor.estimating.facts import Matrix, RunFacts
from compressor.progress import EstimateReady, Event, Notice
from compressor.recipe_file import read_overrides
from compressor.run.output import OutputPlan
from exporters.protobuf import expected_index_bytes, packed_index_bytes

TESTS = Path(__file__).resolve().parent
GIB = 2**30


def facts(recipe: dict[str, Any] | None = None, **changes: Any) -> RunFacts:
    """A run on LLaMA-7B's shape with the recipe's defaults, changed."""
    matrices = (*[Matrix(4096, 4096)] * 4, *[Matrix(11008, 4096)] * 2, Matrix(4096, 11008))
    weights = sum(matrix.outputs * matrix.inputs for matrix in matrices)
    given: dict[str, Any] = {
        "recipe": read_overrides({"finish.method": "none", **(recipe or {})}),
        "device": torch.device("cpu"), "dtype": torch.float16, "sparsity": 0.7,
        "training": 112, "heldout": 16, "evaluation": 64, "seqlen": 2048, "hidden": 4096, "vocab": 32000,
        "blocks": 32, "block_weights": weights, "all_block_weights": 32 * weights, "other_weights": 262_144_000,
        "kept_per_token": 4 * sum(matrix.outputs + matrix.inputs for matrix in matrices),
        "matrices": matrices, "pruned_weights": 32 * weights,
        "shapes": {4096 * 4096: 4 * 32, 4096 * 11008: 3 * 32},
    }  # fmt: skip
    return RunFacts(**{**given, **changes})


def some_estimate(**changes: Any) -> Estimate:
    """An estimate that fits, changed."""
    size = disk.OutputSize(4 * GIB, 5 * GIB, 3 * GIB, 4 * GIB)
    given: dict[str, Any] = {
        "host_bytes": 10 * GIB, "host_free_bytes": 20 * GIB, "device_bytes": None, "device_free_bytes": None,
        "stage": "repair", "activations_bytes": 8 * GIB, "spilled_bytes": 0, "state_bytes": 2 * GIB,
        "output": size, "output_bytes": 7 * GIB, "disk_free_bytes": 20 * GIB, "block_s": 60.0,
        "blocks_s": 7200.0, "blocks": 120,
    }  # fmt: skip
    return Estimate(**{**given, **changes})


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system tells no peak of a stretch"
)
def test_memory_is_within_the_factor_of_the_measured_peak(tmp_path: Path) -> None:
    """Two blocks of width 512, ADMM, pairs of blocks, all blocks together: what the blocks take beyond the start."""
    command = [sys.executable, str(TESTS / "estimate_peak.py"), str(tmp_path), "admm", "kl"]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["measured"] > 100 * 2**20  # enough to be more than the allocator's habits
    assert 1 / FACTOR < found["estimated"] / found["measured"] < FACTOR, found


@pytest.mark.parametrize(
    ("change", "larger"),
    [
        ({"training": 224}, memory.stream_bytes),
        ({"evaluation": 128}, memory.stream_bytes),
        ({"recipe": {"recovery.window": "overlap"}}, memory.stream_bytes),
        ({"recipe": {"recovery.window": "overlap"}}, lambda f: memory.work_bytes(f).repair),
        ({"recipe": {"recovery.batch_size": 16}}, lambda f: memory.work_bytes(f).repair),
        ({"recipe": {"pruning.method": "admm"}}, lambda f: memory.work_bytes(f).prune),
        ({"recipe": {"finish.method": "kl"}}, lambda f: memory.work_bytes(f).peak),
        ({"training": 224}, disk.state_bytes),
        ({"recipe": {"finish.method": "kl"}}, disk.state_bytes),
    ],
)
def test_more_takes_more(change: dict[str, Any], larger: Callable[[RunFacts], int]) -> None:
    """More windows, pairs of blocks, larger batches, a solver, a finish: each shows in its figure."""
    assert larger(facts(**change)) > larger(facts())


def test_published_recipe_on_7b_needs_one_path() -> None:
    """Targets of the block itself need no dense path: inputs and targets, and the windows of three versions."""
    run = facts({"recovery.targets": "block"})
    calibrated, evaluated = (4 * windows * 2048 * 4096 for windows in (128, 64))
    assert memory.stream_bytes(run) == 2 * calibrated + 3 * evaluated


def test_a_trained_block_takes_21_bytes_a_weight_and_its_activations() -> None:
    """Weight, gradient, two moments, best copy, mask; beside it a copy of the rate's trials and one of what came."""
    run = facts({"recovery.lr": 1e-4})
    kept = 2 * 8 * 2048 * run.kept_per_token
    assert memory.work_bytes(run).repair == 21 * run.block_weights + kept
    assert memory.work_bytes(run).origin == 4 * run.block_weights
    assert memory.work_bytes(facts()).repair == 25 * run.block_weights + kept


@pytest.mark.parametrize(("size", "density"), [(100, 0.5), (40_000, 0.3), (3_000_000, 0.1)])
def test_bytes_of_indices_are_those_of_a_random_mask(size: int, density: float) -> None:
    """Varints of one to four bytes, within sampling."""
    kept = np.random.default_rng(0).random(size) < density
    exact = packed_index_bytes(kept) * density * size / np.count_nonzero(kept)
    assert expected_index_bytes(size, density) == pytest.approx(exact, rel=0.05 if size < 1000 else 0.002)


def test_output_takes_the_smaller_form_of_each_matrix() -> None:
    """float16 at 50 %: four-byte indices of large matrices make sparse larger than dense, so auto stays dense."""
    size = disk.output_size(facts(sparsity=0.5))
    assert size.dense == 2 * facts().all_block_weights + 2 * facts().other_weights
    assert size.sparse > size.dense
    assert size.auto == size.dense
    smaller = disk.output_size(facts(dtype=torch.float32, sparsity=0.9))
    assert smaller.auto == smaller.sparse < 0.5 * smaller.dense
    assert smaller.of("dense") == smaller.dense


def test_time_grows_with_passes_and_text() -> None:
    """Epochs times windows, trials of learning rates once, all blocks together."""
    pace = step.Pace(forward=1e-6, both=3e-6, step=1e-3, flops=1e12)
    once, _ = step.block_seconds(facts({"recovery.epochs": 1, "recovery.lr": 1e-4}), pace)
    twice, trials = step.block_seconds(facts({"recovery.epochs": 2, "recovery.lr": 1e-4}), pace)
    assert twice - once == pytest.approx(112 * 2048 * 3e-6 + 14 * 1e-3 + 16 * 2048 * 1e-6)
    assert trials == 0
    assert step.block_seconds(facts(), pace)[1] > 0
    assert step.tuning_seconds(facts(), pace) == 0
    assert step.tuning_seconds(facts({"finish.method": "kl"}), pace) > 0


@pytest.mark.parametrize(
    ("changes", "error_id", "says", "do"),
    [
        ({"host_free_bytes": 9 * GIB}, "E-ESTIMATE-MEMORY", "10.00 GiB of memory, 9.00 GiB", "--activation-memory"),
        ({"host_free_bytes": GIB}, "E-ESTIMATE-MEMORY", "1.00 GiB are there", "recovery.window=block"),
        ({"disk_free_bytes": 5 * GIB}, "E-ESTIMATE-DISK", "9.00 GiB of disk", "another disk"),
        ({"device_bytes": 9 * GIB, "device_free_bytes": GIB}, "E-ESTIMATE-DEVICE", "device memory", "--batch-size"),
        (
            {"device_bytes": 9 * GIB, "device_free_bytes": GIB, "stage": "together"},
            "E-ESTIMATE-DEVICE",
            "device memory",
            "--finish none",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_to_change(
    changes: dict[str, Any], error_id: str, says: str, do: str
) -> None:
    """Needed against free, and a way out that is about what is too large."""
    refuse_misfits(some_estimate())
    with pytest.raises(OutOfResources) as caught:
        refuse_misfits(some_estimate(**changes))
    assert (caught.value.error_id, caught.value.exit_code) == (error_id, 5)
    assert says in caught.value.message
    assert do in caught.value.remedy


def test_advice_for_states_is_a_size_that_fits() -> None:
    """With the --activation-memory that is named, the same run fits."""
    with pytest.raises(OutOfResources) as caught:
        refuse_misfits(some_estimate(host_free_bytes=9 * GIB))
    mib = int(caught.value.remedy.split("--activation-memory ")[1].split("MiB")[0])
    spilled = 8 * GIB - mib * 2**20
    refuse_misfits(
        some_estimate(host_free_bytes=9 * GIB, host_bytes=10 * GIB - spilled, spilled_bytes=spilled)
    )


def test_estimate_writes_nothing(workshop: Workshop, tmp_path: Path) -> None:
    """No output, no state, no staging; states beyond the limit count on the disk and not in memory."""
    out, told = tmp_path / "sparse.onnx", list[Event]()
    before = contents(workshop.root)
    whole = estimate_run(workshop.model, out, workshop.recipe(), progress=told.append)
    spilled = estimate_run(workshop.model, out, workshop.recipe(), activation_memory=0)
    assert list(tmp_path.iterdir()) == []
    assert contents(workshop.root) == before
    assert spilled.spilled_bytes == whole.activations_bytes > 0
    assert spilled.disk_bytes == whole.disk_bytes + whole.activations_bytes
    assert whole.block_s is not None
    assert whole.block_s > 0
    assert any(isinstance(event, EstimateReady) for event in told)


def test_dry_run_prints_and_refuses(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 0 with a table, or JSON; exit 5 with the id where memory is not there; no file either way."""
    texts = ["--calibration", str(workshop.texts.calibration), "--eval-data", str(workshop.texts.evaluation)]
    short = [*texts, "--seqlen", "24", "--num-calibration-samples", "10", "--max-eval-windows", "4"]
    command = ["run", str(workshop.model), "--out", str(tmp_path / "sparse.onnx"), *short, "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "memory" in said.out
    assert "ONNX, sparse" in said.out
    assert "estimate       memory" in said.err
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["estimate"]
    assert {"host_bytes", "disk_bytes", "block_s", "output"} <= found.keys()
    monkeypatch.setattr(estimate, "available_memory_bytes", lambda: -(2**40))
    assert main([*command, "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"]["id"] == "E-ESTIMATE-MEMORY"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "outcome"), [(3.0, "told"), (0.9, "warned"), (0.5, "refused")])
def test_long_run_tells_warns_or_refuses_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, free: float, outcome: str
) -> None:
    """A run that may not fit is warned of; one that cannot, the estimate's factor granted, is refused."""
    from compressor import pipeline

    needed = dataclasses.replace(some_estimate(), host_free_bytes=int(free * 10 * GIB))
    monkeypatch.setattr(pipeline, "estimate_job", lambda *_: needed)
    told: list[Event] = []
    place = OutputPlan(Path("/x.onnx"), Path("/"), "x", True, False)

    def foresee() -> None:
        pipeline.foresee(None, torch.float32, place, None, told.append)  # type: ignore[arg-type]

    if outcome == "refused":
        with pytest.raises(OutOfResources):
            foresee()
    else:
        foresee()
    assert isinstance(told[0], EstimateReady)
    assert told[0].time == "1 min 0 s a block, 2 h 0 min for 120 blocks, export and validation not counted"
    assert any(isinstance(event, Notice) and event.shortfall for event in told) == (outcome == "warned")
