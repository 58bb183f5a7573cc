"""The end-to-end finish: all kept weights, tuned until the sparse model predicts like the dense one.

    min_W  mean over tokens of τ² · KL( softmax(z_dense / τ) ‖ softmax(z_sparse(M * W) / τ) )
           + h_sq · Σ_l mean((h_l^S − h_l^T)²) / mean((h_l^T)²),   M frozen

on the calibration windows of the recovery before it. Knowledge distillation (Hinton et al., arXiv 1503.02531)
with the dense model as the teacher, as sparse finetuning does it (arXiv 2310.06927), without the text's own tokens.
Logits alone are learnt by heart on little text (docs/methods.md has the losses of calibration and held-out windows side
by side). Against that the second term asks for the hidden states of every layer too, and some tokens of a training
window are exchanged each time it is used (compressor.finetuning.noise).
"""

from __future__ import annotations

from compressor.finetuning.losses import Objective
from compressor.finetuning.parametrisation import OwnWeights
from compressor.finetuning.sparse_model import SparseModel
from compressor.finetuning.tuning import Finetuned, Tell, tune
from compressor.recipe import FinishRecipe


def finish(model: SparseModel, recipe: FinishRecipe, *, seed: int, tell: Tell) -> Finetuned:
    """Tunes all kept weights, biases and norm gains of ``model``'s blocks in place; see ``tuning.tune``."""
    objective = Objective(
        kd=1.0,
        sq=recipe.squarehead,
        temperature=recipe.temperature,
        noise=recipe.noise,
        noise_from=recipe.noise_from,
        noise_fades=recipe.noise_fades,
    )
    return tune("kl", model, OwnWeights(model), objective, recipe, recipe.trials, seed=seed, tell=tell)
