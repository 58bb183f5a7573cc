"""Settings of a recipe that are each in range and do not go together; found before any model is opened."""

from __future__ import annotations

from compressor.errors import UsageError
from compressor.recipe import ExportRecipe, Recipe

__all__ = ["check_combination", "check_export"]

# They move zeros about, and a model that lost whole heads and neurons has none.
_MOVE_MASKS = ("dsnot", "ebft-mask")


def check_combination(recipe: Recipe) -> None:
    """Do nothing where pruner, pattern, recovery and gates of a recipe fit each other.

    Raises:
        UsageError: As ``check_export``; E-ALLOCATION-PATTERN, E-FLAP-ALLOCATION, E-FLAP-PATTERN, E-FLAP-RECOVERY,
            E-FLAP-GATE, E-FLAP-UNIFORM, E-UNIFORM-PRUNER.
    """
    check_export(recipe.export)
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


def check_export(export: ExportRecipe) -> None:
    """Do nothing where type, encoding and activations of an export fit each other.

    Raises:
        UsageError: E-EXPORT-ENCODING, E-EXPORT-ACTIVATIONS.
    """
    if export.weight_bits is not None and export.encoding not in ("auto", "packed"):
        raise UsageError(
            "E-EXPORT-ENCODING",
            f"{export.dtype} weights are stored packed, encoding {export.encoding} has no place for them",
            f"leave --encoding out, or give --dtype float32 with --encoding {export.encoding}",
        )
    if export.activation_bits == 8 and export.weight_bits is None:
        raise UsageError(
            "E-EXPORT-ACTIVATIONS",
            f"activations of 8 bits multiply int8 and int4 weights; the type is {export.dtype}",
            "give --dtype int8 or int4, or leave --activation-bits out",
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
