"""SquareHead: all kept weights, tuned towards the text and the hidden states of every dense layer.

    L = h_ce · CE + h_kd · KL + h_sq · Σ_l mean((h_l^S − h_l^T)²) / mean((h_l^T)²)

Source: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", arXiv 2310.06927,
section 3, and SparseFinetuning's train_sparse.py. Deviations: the teacher is the dense model itself, not one that
was finetuned on a task; KL is over all tokens.
"""

from __future__ import annotations

from compressor.finetuning.losses import Objective
from compressor.finetuning.parametrisation import OwnWeights
from compressor.finetuning.sparse_model import SparseModel
from compressor.finetuning.tuning import Finetuned, Tell, settings_of, tune
from compressor.recipe import RecoveryRecipe


def repair(model: SparseModel, recipe: RecoveryRecipe, *, seed: int, tell: Tell) -> Finetuned:
    """Tunes all kept weights, biases and norm gains beside a dense copy of the blocks; see ``tuning.tune``."""
    own = recipe.squarehead
    objective = Objective(ce=own.ce, kd=own.kd, sq=own.sq, temperature=own.temperature)
    settings = settings_of(recipe, own.lr)
    return tune(
        "squarehead", model, OwnWeights(model), objective, settings, recipe.probe, seed=seed, tell=tell
    )
