"""What a pass reports is the perplexity of the model that it wrote, whatever type that was rounded to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flap_samples import CPU, IDS
from tiny_checkpoints import write_checkpoint

from compressor.block_pass import BlockPass
from compressor.block_result import PassResult
from compressor.linears import IgnoreRules
from compressor.models.checkpoint import open_checkpoint
from compressor.models.loading import load_causal_lm
from compressor.models.quiet import quiet_transformers
from compressor.models.source import open_source
from compressor.models.writer import CheckpointWriter
from compressor.recipe_file import read_overrides
from compressor.sparsity import SparsityPattern
from validators.perplexity import perplexity, sum_nll

WINDOWS = IDS[4:]


def press(folder: Path, dtype: torch.dtype, pruner: str, recovery: str) -> PassResult:
    """A pass over a tiny float32 llama, its embedding rounded to bfloat16, blocks written in ``dtype``."""
    source = open_source(open_checkpoint(write_checkpoint(folder / "in")), CPU, stored_dtype=torch.bfloat16)
    settings = {"pruning.method": pruner, "recovery.method": recovery}
    if recovery != "none":
        settings.update({"recovery.epochs": 2, "recovery.lr": 1e-3})
    writer = CheckpointWriter(folder / "out", source, dtype)
    passed = BlockPass(
        source,
        IDS[:3],
        IDS[3:4],
        WINDOWS,
        recipe=read_overrides(settings),
        pattern=SparsityPattern.unstructured(0.3),
        ignore=IgnoreRules(),
        device=CPU,
        stop=lambda: False,
        progress=lambda event: None,
    ).run(writer)
    writer.finish()
    return passed


def perplexity_of(folder: Path) -> float:
    """Of a written model as it is loaded, computed in float32."""
    with torch.no_grad(), quiet_transformers():
        logits = load_causal_lm(open_checkpoint(folder), torch.float32)(WINDOWS).logits
    return perplexity(sum_nll(logits, WINDOWS).sum(), WINDOWS.shape[0] * (WINDOWS.shape[1] - 1))


@pytest.mark.parametrize(
    ("pruner", "recovery"),
    [("wanda", "none"), ("flap", "none"), ("wanda", "ebft"), ("wanda", "masked-lora")],
)
def test_rounding_is_part_of_what_ships(tmp_path: Path, pruner: str, recovery: str) -> None:
    """In bfloat16 the last perplexity of the pass is that of the rounded model, repaired or not."""
    found = press(tmp_path, torch.bfloat16, pruner, recovery).perplexities
    # The same weights on the same windows; rounding itself moves the perplexity by far more.
    assert found["recovered"] == pytest.approx(perplexity_of(tmp_path / "out"), rel=1e-5)
    assert (found["pruned"] == found["recovered"]) == (recovery == "none")


def test_rounding_moves_the_perplexity_visibly(tmp_path: Path) -> None:
    """Blocks in bfloat16 differ from those in float32 by far more than a test's tolerance."""
    (tmp_path / "rounded").mkdir()
    exact = press(tmp_path, torch.float32, "wanda", "none").perplexities["pruned"]
    rounded = press(tmp_path / "rounded", torch.bfloat16, "wanda", "none").perplexities["pruned"]
    assert abs(rounded / exact - 1) > 1e-4
