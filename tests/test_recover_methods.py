"""Block-wise recoveries go through the whole run on a model of linears, of transposed linears, and of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from workshop import Workshop

from compressor import compress

HALF, TWO_OF_FOUR = {"pruning__sparsity": 0.5}, {"pruning__pattern": "2:4"}
DSNOT = {"recovery__method": "dsnot", "recovery__dsnot": {"skip": [], "update_threshold": 0.0}}
EBFT_MASK = {"recovery__method": "ebft-mask", "recovery__lr": 0.5}  # few steps, so that long ones are needed
SPLIT = {"recovery__window": "split", "recovery__first_token": "per_token"}
OVERLAP = {"recovery__window": "overlap", "recovery__start": "least_squares"}
RUNS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", DSNOT, HALF),
    ("gpt2", DSNOT, TWO_OF_FOUR),
    ("qwen3_moe", DSNOT, TWO_OF_FOUR),
    ("llama", EBFT_MASK, TWO_OF_FOUR),
    ("gpt2", EBFT_MASK, HALF),
    ("qwen3_moe", SPLIT, HALF),
    ("gpt2", OVERLAP, TWO_OF_FOUR),
    ("qwen3_moe", OVERLAP, HALF),
]


@pytest.mark.parametrize(("architecture", "recovery", "pattern"), RUNS)
def test_methods_pass_every_check(
    tmp_path: Path,
    workshop: Workshop,
    architecture: str,
    recovery: dict[str, Any],
    pattern: dict[str, Any],
) -> None:
    """What the method gives is kept, half of the weights are zero, and the export equals PyTorch."""
    model = tiny_models.save_variant(tmp_path / "model", architecture)
    settings = {"recovery__selection": "last", "gates__min_sparsity": 0.49, **recovery, **pattern}
    result = compress(model, tmp_path / "sparse.onnx", tiny_models.short_recipe(workshop.texts, **settings))
    assert result.passed is True
    assert result.report["sparsity"]["measured"] == 0.5
    assert [row["best_step"] == row["steps"] > 0 for row in result.report["blocks"]] == [True, True]
    assert all(row["loss_after"] != row["loss_before"] for row in result.report["blocks"])
