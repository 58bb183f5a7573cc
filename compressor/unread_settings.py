"""Settings that were made and have no effect, since what was chosen beside them does not read them.

No error: one set of options serves runs of several methods. But a run says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from pydantic import BaseModel

from compressor.recipe import Recipe

__all__ = ["unread_settings"]

_BLOCK_BY_BLOCK = ("ebft", "dsnot", "ebft-mask")
_END_TO_END = ("lora", "masked-lora", "spp", "squarehead", "norms")
_TRAINED = ("ebft", "ebft-mask", *_END_TO_END)
_MASKS = ("magnitude", "wanda", "sparsegpt", "admm", "alps")

# What a recipe chooses, by the name that a user is told.
_CHOICES: Mapping[str, Callable[[Recipe], object]] = {
    "pruner": lambda recipe: recipe.pruning.method,
    "pruning.flap.structure": lambda recipe: recipe.pruning.flap.structure,
    "allocation": lambda recipe: recipe.pruning.allocation,
    "recovery": lambda recipe: recipe.recovery.method,
    "recovery.targets": lambda recipe: recipe.recovery.targets,
    "recovery.lr": lambda recipe: recipe.recovery.lr,
    "learning rate": lambda recipe: _learning_rate(recipe),
    "finish": lambda recipe: recipe.finish.method if recipe.may_finish else "none",
    "finish.lr": lambda recipe: recipe.finish.lr,
}

# A choice, those of its values that read some keys, and these; a section stands for all of its keys. Of the rows
# that hold of a key the first one tells.
_READERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("pruner", ("sparsegpt", "admm", "alps"), ("pruning.update_weights",)),
    ("pruner", ("sparsegpt",), ("pruning.column_block", "pruning.damping")),
    ("pruner", ("admm",), ("pruning.admm",)),
    ("pruner", ("alps",), ("pruning.alps",)),
    ("pruner", ("flap",), ("pruning.flap",)),
    ("pruning.flap.structure", ("AL-MM", "UL-MM"), ("pruning.flap.remove_heads",)),
    ("allocation", ("owl",), ("pruning.owl",)),
    ("allocation", ("linear",), ("pruning.linear",)),
    ("recovery", (*_BLOCK_BY_BLOCK, *_END_TO_END), ("recovery",)),
    (
        "recovery",
        _BLOCK_BY_BLOCK,
        ("recovery.targets", "recovery.targets_blend", "recovery.loss", "recovery.first_token"),
    ),
    ("recovery.targets", ("blend",), ("recovery.targets_blend",)),
    ("recovery", ("ebft",), ("recovery.window", "recovery.start", "recovery.probe.blocks")),
    ("recovery", ("ebft",), ("recovery.epochs_before_finish",)),
    ("finish", ("kl", "auto"), ("recovery.epochs_before_finish",)),
    ("pruner", _MASKS, ("recovery.start",)),  # it solves for the kept weights of a mask
    (
        "recovery",
        _TRAINED,
        (
            *("recovery.epochs", "recovery.lr", "recovery.beta1", "recovery.beta2", "recovery.eps"),
            *("recovery.weight_decay", "recovery.schedule", "recovery.warmup", "recovery.max_grad_norm"),
            "recovery.probe",
        ),
    ),
    ("recovery", tuple(method for method in _TRAINED if method != "spp"), ("recovery.weight_decay",)),
    ("recovery", ("dsnot",), ("recovery.dsnot",)),
    ("recovery", ("ebft-mask",), ("recovery.ebft_mask",)),
    ("recovery", ("lora",), ("recovery.lora",)),
    ("recovery", ("masked-lora",), ("recovery.masked_lora",)),
    ("recovery", ("spp",), ("recovery.spp",)),
    ("recovery", ("squarehead",), ("recovery.squarehead",)),
    ("recovery", ("norms",), ("recovery.norms",)),
    (
        "recovery.lr",
        ("auto",),
        tuple(f"recovery.{method.replace('-', '_')}.lr" for method in ("ebft-mask", *_END_TO_END)),
    ),
    ("learning rate", ("auto",), ("recovery.probe",)),
    ("finish", ("kl", "auto"), ("finish",)),
    ("finish.lr", ("auto",), ("finish.trials",)),
)


def unread_settings(recipe: Recipe) -> tuple[str, ...]:
    """One line for each choice of ``recipe`` that leaves settings of the user's without effect.

    What a built-in recipe sets is not the user's (see ``read_recipe``), nor is a default in a section that has
    every key written out, as ``Recipe.to_yaml`` does.
    """
    by_choice: dict[str, list[str]] = {}
    for key in _set_keys(recipe, Recipe()):
        for name, readers, keys in _READERS:
            chosen = str(_CHOICES[name](recipe))
            if chosen not in readers and any(key == one or key.startswith(f"{one}.") for one in keys):
                by_choice.setdefault(f"{name} {chosen}", []).append(key)
                break
    return tuple(f"of no effect with {choice}: {', '.join(keys)}" for choice, keys in by_choice.items())


def _set_keys(section: BaseModel, default: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the values that the user has set; a method is a choice itself."""
    given = section.model_fields_set
    for name in type(section).model_fields:
        value, usual = getattr(section, name), getattr(default, name)
        if name not in given:
            continue
        if isinstance(value, BaseModel):
            yield from _set_keys(value, usual, f"{prefix}{name}.")
        elif name != "method" and (value != usual or len(given) < len(type(section).model_fields)):
            yield prefix + name


def _learning_rate(recipe: Recipe) -> object:
    """The recovery's, where it has none of its own ``auto`` unless it is given."""
    recovery = recipe.recovery
    own = getattr(recovery, recovery.method.replace("-", "_"), None)
    return getattr(own, "lr", "auto") if recovery.lr == "auto" else recovery.lr
