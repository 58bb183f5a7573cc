"""Plain LoRA, whose merge fills zeros: W' = W + (α / r) B A, with no mask.

Source: Hu et al., arXiv 2106.09685, as Wanda's lora_ft uses it on pruned models (arXiv 2306.11695). Kept apart
from W the factors cost memory and time in use; merged they fill the zeros of the matrices that they belong to.
The merge is made here, and the masks of those matrices become what is not zero afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressor.finetuning.adapters import Adapter, Adapters
from compressor.finetuning.losses import Objective
from compressor.finetuning.sparse_model import SparseModel
from compressor.finetuning.tuning import Finetuned, Tell, settings_of, tune
from compressor.recipe import RecoveryRecipe
from compressor.sparsity import Mask


class LowRank(Adapter):
    """ΔW = (α / r) B A: A (r, in) uniform in ±1/√in at first, B (out, r) zero, so that ΔW is 0.

    Args:
        W: (out, in).
        rank: r.
        alpha: α.
        generator: Of A.
    """

    def __init__(self, W: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = W.shape
        self.A = nn.Parameter(uniform(rank, columns, generator), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(rows, rank), requires_grad=False)
        self.scale = alpha / rank

    def delta(self) -> Tensor:
        """ΔW (out, in)."""
        return self.scale * self.B @ self.A

    def answer(self, X: Tensor) -> Tensor:
        """ΔW X through the factors, (..., out)."""
        return self.scale * nn.functional.linear(nn.functional.linear(X, self.A), self.B)


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Numbers in ±1/√columns, (rows, columns): kaiming_uniform with a = √5, as LoRA and SPP start A."""
    return (2 * torch.rand(rows, columns, generator=generator) - 1) / math.sqrt(columns)


def repair(model: SparseModel, recipe: RecoveryRecipe, *, seed: int, tell: Tell) -> Finetuned:
    """Trains the factors on the text and merges them; the result has the masks that are left, if any, and says so."""
    own = recipe.lora
    adapters = Adapters(
        model,
        lambda W, mask, generator: LowRank(W, own.rank, own.alpha, generator),
        targets=own.targets,
        dropout=own.dropout,
        seed=seed,
    )
    tuned = tune(
        "lora",
        model,
        adapters,
        Objective(ce=1.0),
        settings_of(recipe, own.lr),
        recipe.probe,
        seed=seed,
        tell=tell,
        keeps_masks=False,
    )
    if not model.all_masks():  # heads and neurons were taken out: there are no zeros to fill
        return tuned
    masks = tuple(
        {name: mask | (block.get_parameter(name) != 0) for name, mask in own_masks.items()}
        for block, own_masks in zip(model.blocks, model.masks, strict=True)
    )
    before, left = _zeros(model.masks), _zeros(masks)
    if left == before:  # step 0 was the best one: nothing was merged
        return tuned
    note = f"merging LoRA fills zeros: {100 * left:.2f} % of the pruned weights are zero now, {100 * before:.2f} % were"
    return replace(tuned, masks=masks, note=note)


def _zeros(masks: Sequence[Mapping[str, Mask]]) -> float:
    """Share of masked weights."""
    every = [mask for own in masks for mask in own.values()]
    return sum(int((~mask).sum()) for mask in every) / sum(mask.numel() for mask in every)
