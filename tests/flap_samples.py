"""Tiny models with heads and neurons taken out of them, without a whole run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import write_checkpoint
from torch import Tensor

from compressor.linears import IgnoreRules
from compressor.models.checkpoint import open_checkpoint
from compressor.models.source import LoadedSource, open_source
from compressor.models.writer import CheckpointWriter
from compressor.recipe import FlapRecipe
from compressor.structured import StructuredPlan, find_anatomy, plan_removal, prune_units

CPU = torch.device("cpu")
IDS = torch.randint(3, 100, (6, 16), generator=torch.Generator().manual_seed(4))

# What each variant lets go of; the others, with experts, are refused.
HEADS_AND_NEURONS = (
    "llama", "llama3_rope", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "smollm3",
)  # fmt: skip
NEURONS_ONLY = ("phi3", "gpt2", "gpt_neox", "bloom", "falcon", "falcon_new")
WITH_EXPERTS = ("mixtral", "qwen3_moe")


def open_tiny(folder: Path, name: str = "llama", **overrides: Any) -> LoadedSource:
    """A tiny model of one variant, opened."""
    return open_source(open_checkpoint(write_checkpoint(folder, name, **overrides)), CPU)


def planned(
    source: LoadedSource, sparsity: float = 0.3, ignore: tuple[str, ...] = (), **settings: Any
) -> StructuredPlan:
    """FLAP's plan for a model, from a few windows of random tokens."""
    recipe = FlapRecipe(**settings)
    anatomy = find_anatomy(source, IgnoreRules(ignore), sparsity, uniform=recipe.uniform)
    return plan_removal(source, IDS, CPU, anatomy, recipe, sparsity)


def uniform_widths(source: LoadedSource, sparsity: float) -> Mapping[str, int]:
    """The config values of uniform widths."""
    return find_anatomy(source, IgnoreRules(), sparsity, uniform=True).widths


def write_pruned(
    source: LoadedSource, out: Path, plan: StructuredPlan, widths: Mapping[str, int] | None = None
) -> Tensor:
    """Write the model without what ``plan`` takes; the logits (B, T, V) of the blocks that were committed."""
    writer = CheckpointWriter(out, source, torch.float32, widths=widths)
    with torch.no_grad():
        hidden = source.embed(IDS)
        for index, cuts in enumerate(plan.cuts):
            block = source.load_block(index)
            prune_units(block, cuts)
            writer.commit(index, block, {})
            hidden = source.forward(index, block, hidden)
        writer.finish()
        return source.head(hidden)
