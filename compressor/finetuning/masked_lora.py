"""LoRA under the mask: W' = W + M ⊙ (α / r) B A, in training and in the merge, so that zeros stay zeros.

Sources: MaskLoRA of PERP (Zimmer et al., arXiv 2312.15230, section 3.2) and LoSA, whose published rank, α, dropout,
targets and learning rate are the recipe's defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.finetuning.adapters import Adapter, Adapters
from compressor.finetuning.lora import LowRank
from compressor.finetuning.losses import Objective
from compressor.finetuning.sparse_model import SparseModel
from compressor.finetuning.tuning import Finetuned, Tell, settings_of, tune
from compressor.recipe import RecoveryRecipe
from compressor.sparsity import Mask


class MaskedLowRank(LowRank):
    """ΔW = M ⊙ (α / r) B A.

    Args:
        W: (out, in).
        mask: M, of W's shape.
        rank: r.
        alpha: α.
        generator: Of A.
    """

    def __init__(self, W: Tensor, mask: Mask, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(W, rank, alpha, generator)
        self._mask = mask

    def delta(self) -> Tensor:
        """ΔW (out, in)."""
        return self._mask * super().delta()

    def answer(self, X: Tensor) -> Tensor:
        """ΔW X, (..., out); a masked product has no shorter way."""
        return Adapter.answer(self, X)


def repair(model: SparseModel, recipe: RecoveryRecipe, *, seed: int, tell: Tell) -> Finetuned:
    """Trains the factors on the text and merges them under the masks; see ``tuning.tune``."""
    own = recipe.masked_lora
    adapters = Adapters(
        model,
        lambda W, mask, generator: MaskedLowRank(W, mask, own.rank, own.alpha, generator),
        targets=own.targets,
        dropout=own.dropout,
        seed=seed,
    )
    settings = settings_of(recipe, own.lr)
    return tune(
        "masked-lora", model, adapters, Objective(ce=1.0), settings, recipe.probe, seed=seed, tell=tell
    )
