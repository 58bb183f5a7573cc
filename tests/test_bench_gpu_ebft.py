"""The benchmark for a GPU runs at a small shape on the CPU, and its sides do what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import gpu_ebft  # its folder has to be known first

CPU = torch.device("cpu")


def test_benchmark_prints_a_row_for_each_side() -> None:
    """Both sides, seconds, minutes of a model, share of the matmul peak, losses; memory is CUDA's alone."""
    done = CliRunner().invoke(gpu_ebft.main, ["--small", "--device", "cpu", "--measured", "2"])
    assert done.exit_code == 0, done.output
    rows = [line.split(" | ") for line in done.output.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| loop", "| blockpress", "| published"]
    assert all(row[3] == "not measured" for row in rows[1:])
    assert all(float(row[4].removesuffix(" %")) > 0 for row in rows[1:])
    assert "published / blockpress: " in done.output


def test_both_sides_start_alike_and_get_better() -> None:
    """The same masked block in float32 on both sides, and a loss that training lowers."""
    shape = gpu_ebft.SMALL
    subject = gpu_ebft.subject_of(shape, CPU, seed=0)
    untrained = gpu_ebft.published(subject, gpu_ebft.Shape(**{**vars(shape), "epochs": 1}), lr=0.0)
    ours = gpu_ebft.product(subject, shape, 1e-3, compiled=False)
    theirs = gpu_ebft.published(subject, shape, 1e-3)
    assert untrained.loss_before == pytest.approx(theirs.loss_before, rel=1e-6)
    assert untrained.loss_after == pytest.approx(theirs.loss_before, rel=1e-6)
    assert ours.loss_after < ours.loss_before
    assert theirs.loss_after < theirs.loss_before


def test_flops_are_those_of_the_published_shape() -> None:
    """LLaMA-7B's block has 202.4 M weights; 256 x 1024 tokens, ten epochs, are 3.2 PFLOP and the attention's share."""
    shape = gpu_ebft.Shape()
    assert shape.weights == 202_375_168
    assert shape.training_flops == pytest.approx(3.2e15 * 1.02, rel=0.01)
