"""Runs whose blocks bear different shares of the sparsity: what is pruned, what the report says, what is refused."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from flap_samples import CPU, IDS, open_tiny
from workshop import Workshop

from compressor.block_sparsity import block_patterns
from compressor.errors import StoppedSafely, UsageError
from compressor.linears import IgnoreRules, observe_inputs, prunable_matrices
from compressor.models.source import LoadedSource
from compressor.progress import silent
from compressor.pruning.allocation import outlier_ratio
from compressor.recipe import PruningRecipe
from compressor.sparsity import SparsityPattern


def shares_of(
    source: LoadedSource, allocation: str, *, ignore: tuple[str, ...] = (), **sections: Any
) -> list[float]:
    """The sparsity of each block for a mean of 0.6."""
    recipe = PruningRecipe(allocation=allocation, **sections)
    patterns = block_patterns(
        source,
        recipe,
        SparsityPattern.unstructured(0.6),
        IgnoreRules(ignore),
        IDS,
        CPU,
        stop=lambda: False,
        progress=silent,
    )
    return [pattern.sparsity for pattern in patterns]


def dense_ratios(source: LoadedSource, m: float) -> list[float]:
    """Outliers of each block, from the dense model run as a whole."""
    ratios = []
    with torch.no_grad():
        hidden = source.embed(IDS)
        for index in range(source.num_blocks):
            block = source.load_block(index)
            matrices = prunable_matrices(block, f"{source.blocks_name}.{index}", IgnoreRules())
            seen: dict[str, list[torch.Tensor]] = defaultdict(list)
            with observe_inputs(block, matrices, lambda name, X, seen=seen: seen[name].append(X)):
                hidden = source.forward(index, block, hidden)
            pairs = [(matrix.of(block), torch.cat(seen[matrix.name]).norm(dim=0)) for matrix in matrices]
            ratios.append(outlier_ratio(pairs, m))
    return ratios


def test_allocation_owl_counts_outliers_of_the_dense_model(tmp_path: Path) -> None:
    """The block with more scores far above the mean is pruned less, by 2 λ between the two extremes."""
    source = open_tiny(tmp_path, num_hidden_layers=3)
    ratios = dense_ratios(source, 3.0)
    shares = shares_of(source, "owl", owl={"lmbda": 0.05, "m": 3.0})
    assert sorted(range(3), key=lambda index: -shares[index]) == sorted(range(3), key=ratios.__getitem__)
    assert max(shares) - min(shares) == pytest.approx(0.1)
    assert sum(shares) / 3 == pytest.approx(0.6, abs=1e-12)


def test_allocation_mean_counts_weights_that_are_not_ignored(tmp_path: Path) -> None:
    """A block with half its weights ignored counts half; one without any bears nothing and counts nothing."""
    source = open_tiny(tmp_path, num_hidden_layers=3)
    ignore = ("model.layers.0.mlp*", "model.layers.1")
    shares = shares_of(source, "linear", ignore=ignore, linear={"slope": 0.1})
    sizes = [4 * 32**2 - 2 * 32 * 16, 0, 4 * 32**2 - 2 * 32 * 16 + 3 * 56 * 32]
    assert sum(share * size for share, size in zip(shares, sizes, strict=True)) == pytest.approx(
        0.6 * sum(sizes)
    )
    assert shares[2] - shares[0] == pytest.approx(0.1)


def test_allocation_survey_can_be_stopped(tmp_path: Path) -> None:
    """A stop between two blocks of the survey ends the run before anything is pruned."""
    source = open_tiny(tmp_path)
    with pytest.raises(StoppedSafely, match="before anything was pruned"):
        block_patterns(
            source,
            PruningRecipe(allocation="owl"),
            SparsityPattern.unstructured(0.6),
            IgnoreRules(),
            IDS,
            CPU,
            stop=lambda: True,
            progress=silent,
        )


@pytest.mark.parametrize("allocation", ["owl", "linear"])
def test_allocation_run_prunes_blocks_by_their_targets(
    tmp_path: Path, workshop: Workshop, allocation: str
) -> None:
    """Each block has the zeros of its own target, and report and page name the targets."""
    settings = {"recovery__method": "none", "pruning__allocation": allocation, "pruning__linear__slope": 0.2}
    result = workshop.quick(tmp_path / "sparse.onnx", **settings)
    targets = [block["target_sparsity"] for block in result.report["blocks"]]
    assert sum(targets) / 2 == pytest.approx(0.5)
    assert targets[0] != targets[1]
    for index, target in enumerate(targets):
        rows = [row for row in result.report["weights"] if row["block"] == index]
        for row in rows:  # floor(in * s) zeros in each row of the matrix
            assert row["sparsity"] == pytest.approx(int(row["shape"][1] * target + 1e-9) / row["shape"][1])
    assert "Targets of the blocks, first to last" in result.html_path.read_text(encoding="utf-8")


def test_allocation_run_keeps_the_target_of_uniform_blocks(workshop: Workshop) -> None:
    """Where all blocks have the model's target, none is stated twice."""
    assert {block["target_sparsity"] for block in workshop.file_output.report["blocks"]} == {None}


@pytest.mark.parametrize(
    ("settings", "error_id"),
    [
        ({"pruning__pattern": "2:4", "pruning__allocation": "owl"}, "E-ALLOCATION-PATTERN"),
        (
            {"pruning__sparsity": 0.7, "pruning__allocation": "linear", "pruning__linear__slope": 0.9},
            "E-ALLOCATION-RANGE",
        ),
    ],
)
def test_allocation_run_refuses_what_cannot_be(
    tmp_path: Path, workshop: Workshop, settings: dict[str, Any], error_id: str
) -> None:
    """Groups of N:M leave no choice of shares, and a share outside 0 and 1 is none."""
    with pytest.raises(UsageError) as refused:
        workshop.quick(tmp_path / "sparse.onnx", **settings)
    assert (refused.value.error_id, refused.value.exit_code) == (error_id, 2)
