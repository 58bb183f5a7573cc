"""The end-to-end methods, one line each: recipe name to the function that tunes the whole sparse model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from compressor.finetuning import kl, lora, masked_lora, norms, spp, squarehead
from compressor.finetuning.sparse_model import SparseModel, Windows
from compressor.finetuning.tuning import Finetuned, Step, Tell, with_masks
from compressor.recipe import FinishRecipe, Recipe, RecoveryRecipe

__all__ = [
    "FINETUNINGS",
    "FINISHES",
    "Finetuned",
    "SparseModel",
    "Stage",
    "Step",
    "Windows",
    "stages_of",
    "with_masks",
]


class Finetuning(Protocol):
    """Tunes the whole model instead of block after block; see :func:`compressor.finetuning.tuning.tune`."""

    def __call__(self, model: SparseModel, recipe: RecoveryRecipe, *, seed: int, tell: Tell) -> Finetuned: ...


class Finish(Protocol):
    """Tunes the whole model after any recovery."""

    def __call__(self, model: SparseModel, recipe: FinishRecipe, *, seed: int, tell: Tell) -> Finetuned: ...


FINETUNINGS: dict[str, Finetuning] = {
    "lora": lora.repair,
    "masked-lora": masked_lora.repair,
    "spp": spp.repair,
    "squarehead": squarehead.repair,
    "norms": norms.repair,
}
FINISHES: dict[str, Finish | None] = {"none": None, "kl": kl.finish}


@dataclass(frozen=True)
class Stage:
    """One end-to-end stage of a run.

    Attributes:
        name: ``recovery`` or ``finish``.
        method: Name in the recipe.
        tune: Tunes a model in place, told a seed and whom to tell of each step.
        needs_dense: Whether it asks for the dense model's last hidden states.
    """

    name: str
    method: str
    tune: Callable[[SparseModel, int, Tell], Finetuned]
    needs_dense: bool


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """What follows the pass over the blocks: an end-to-end recovery, a finish, both or nothing."""
    stages = []
    recovery = FINETUNINGS.get(recipe.recovery.method)
    if recovery is not None:
        stages.append(
            Stage(
                "recovery",
                recipe.recovery.method,
                lambda model, seed, tell: recovery(model, recipe.recovery, seed=seed, tell=tell),
                needs_dense=False,
            )
        )
    finish = FINISHES[recipe.finish.method]
    if finish is not None:
        stages.append(
            Stage(
                "finish",
                recipe.finish.method,
                lambda model, seed, tell: finish(model, recipe.finish, seed=seed, tell=tell),
                # where a dense model runs along, it gives the last states too, but of the windows with their noise
                needs_dense=not recipe.finish.runs_dense or recipe.finish.draws_from_dense,
            )
        )
    return tuple(stages)
