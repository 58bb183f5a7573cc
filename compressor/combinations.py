"""Settings of a recipe that are each in range and do not go together; found before any model is opened."""

from __future__ import annotations

from compressor.errors import UsageError
from compressor.recipe import Recipe

__all__ = ["check_combination"]

# They move zeros about, and a model that lost whole heads and neurons has none.
_MOVE_MASKS = ("dsnot", "ebft-mask")


def check_combination(recipe: Recipe) -> None:
    """Do nothing where pruner, pattern, recovery and gates of a recipe fit each other.

    Raises:
        UsageError: E-ALLOCATION-PATTERN, E-FLAP-ALLOCATION, E-FLAP-PATTERN, E-FLAP-RECOVERY, E-FLAP-GATE,
            E-FLAP-UNIFORM, E-UNIFORM-PRUNER.
    """
    pruning = recipe.pruning
    if pruning.allocation != "uniform" and pruning.pattern is not None:
        raise UsageError(
            "E-ALLOCATION-PATTERN",
            f"pattern {pruning.pattern} leaves every block the same share of zeros, allocation {pruning.allocation} "
            "none",
            "leave --allocation out, or give --sparsity in the place of --pattern",
        )
    if pruning.method == "flap":
        _check_flap(recipe)
    elif pruning.flap.uniform:
        raise UsageError(
            "E-UNIFORM-PRUNER",
            f"--uniform is about the heads and neurons that flap takes out, the pruner is {pruning.method}",
            "give --pruner flap, or leave --uniform out",
        )


def _check_flap(recipe: Recipe) -> None:
    flap = recipe.pruning.flap
    if recipe.pruning.allocation != "uniform":
        raise UsageError(
            "E-FLAP-ALLOCATION",
            f"flap shares the sparsity out itself (pruning.flap.structure), allocation {recipe.pruning.allocation} is "
            "for zeros in matrices",
            "leave --allocation out, or give an unstructured pruner, such as --pruner wanda",
        )
    if recipe.pruning.pattern is not None:
        raise UsageError(
            "E-FLAP-PATTERN",
            f"flap takes out whole heads and neurons, which leaves no zeros in a pattern {recipe.pruning.pattern}",
            "give --sparsity, or an unstructured pruner, such as --pruner wanda",
        )
    if recipe.recovery.method in _MOVE_MASKS:
        raise UsageError(
            "E-FLAP-RECOVERY",
            f"{recipe.recovery.method} moves zeros between weights, and flap leaves none",
            "give --recovery ebft, lora or none",
        )
    if recipe.gates.min_sparsity is not None:
        raise UsageError(
            "E-FLAP-GATE",
            "gates.min_sparsity counts zeros, and flap leaves none: what goes is gone",
            "leave the gate out; the report has the share that went",
        )
    set_here = flap.model_fields_set
    contradiction = {
        "structure": "structure" in set_here and flap.structure != "UL-UM",
        "bias_compensation": "bias_compensation" in set_here and flap.bias_compensation,
    }
    for key, contradicts in contradiction.items():
        if flap.uniform and contradicts:
            raise UsageError(
                "E-FLAP-UNIFORM",
                f"uniform widths come with structure UL-UM and no bias; pruning.flap.{key} is {getattr(flap, key)}",
                f"leave pruning.flap.{key} out, or --uniform",
            )
