"""Norm gains and biases alone, a hundredth of a percent of a large model's parameters.

Source: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv 2312.15230, section 3.1.
"""

from __future__ import annotations

from torch import nn

from compressor.finetuning.losses import Objective
from compressor.finetuning.parametrisation import OwnWeights
from compressor.finetuning.sparse_model import SparseModel
from compressor.finetuning.tuning import Finetuned, Tell, settings_of, tune
from compressor.recipe import RecoveryRecipe
from compressor.recovery.ebft import trained_weights


def vectors(block: nn.Module) -> list[nn.Parameter]:
    """Norm gains and biases of a block: its trained parameters with one axis."""
    return [weight for weight in trained_weights(block) if weight.ndim == 1]


def repair(model: SparseModel, recipe: RecoveryRecipe, *, seed: int, tell: Tell) -> Finetuned:
    """Tunes norm gains and biases of all blocks on the text; see ``tuning.tune``."""
    settings = settings_of(recipe, recipe.norms.lr)
    own = OwnWeights(model, vectors)
    return tune("norms", model, own, Objective(ce=1.0), settings, recipe.probe, seed=seed, tell=tell)
