"""SPP: every kept weight scaled by two small factors, so that zeros stay zeros without a mask.

    W' = W + s · W ⊙ rep(A) ⊙ B,   A (r, in), B (out, 1)

``rep`` repeats each row of A for a stretch of consecutive rows of W. Source: Lu et al., "SPP: Sparsity-Preserved
Parameter-Efficient Fine-Tuning", arXiv 2405.16057, equation 5, and its code (r = 16, s = 16 / 8). Deviation: where
r does not divide W's rows, which stops the published code, the last stretch is shorter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compressor.finetuning.adapters import Adapter, Adapters
from compressor.finetuning.lora import uniform
from compressor.finetuning.losses import Objective
from compressor.finetuning.sparse_model import SparseModel
from compressor.finetuning.tuning import Finetuned, Tell, settings_of, tune
from compressor.recipe import RecoveryRecipe


class Scaling(Adapter):
    """ΔW = s · W ⊙ rep(A) ⊙ B, with B = 0 at first, so that ΔW is 0.

    Args:
        W: (out, in); it is read anew each time.
        rank: r, the most rows that A has.
        scale: s.
        generator: Of A.
    """

    def __init__(self, W: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = W.shape
        self._stretch = math.ceil(rows / rank)
        self._W = W
        self._scale = scale
        self.A = nn.Parameter(
            uniform(math.ceil(rows / self._stretch), columns, generator), requires_grad=False
        )
        self.B = nn.Parameter(torch.zeros(rows, 1), requires_grad=False)

    def delta(self) -> Tensor:
        """ΔW (out, in)."""
        repeated = self.A.repeat_interleave(self._stretch, dim=0)[: len(self.B)]
        return self._scale * self._W * repeated * self.B


def repair(model: SparseModel, recipe: RecoveryRecipe, *, seed: int, tell: Tell) -> Finetuned:
    """Trains the factors on the text and merges them; see ``tuning.tune``."""
    own = recipe.spp
    adapters = Adapters(
        model,
        lambda W, mask, generator: Scaling(W, own.rank, own.scale, generator),
        dropout=own.dropout,
        seed=seed,
    )
    settings = settings_of(recipe, own.lr, weight_decay=own.weight_decay)
    return tune("spp", model, adapters, Objective(ce=1.0), settings, recipe.probe, seed=seed, tell=tell)
