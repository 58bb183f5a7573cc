"""The cells of a grid: each one recipe, with the place in the tables where its figures go."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from compressor.comparison.failures import CellFailure, failure_of
from compressor.comparison.grid import Grid, GridTable, Masks, Variant, check_settings, did_you_mean
from compressor.errors import ReportedError, UsageError
from compressor.recipe import PruningRecipe, Recipe, RecoveryRecipe
from compressor.recipe_file import read_recipe
from compressor.sparsity import SparsityPattern

_UNNAMED = Variant(name="unnamed")


@dataclass(frozen=True)
class Cell:
    """One cell of the grid.

    Attributes:
        table: Name of its table.
        pruner: How weights are chosen.
        recovery: How kept weights are repaired.
        target: What is pruned.
        variant: Name of its variant; "" without one.
        settings: Recipe settings that its table and variant add to those of the grid.
        masks: Whether it starts from the shared pruned model.
        recipe: All its settings; None where it failed already.
        failure: Why it cannot be made.
    """

    table: str
    pruner: str
    recovery: str
    target: SparsityPattern
    variant: str
    settings: Mapping[str, Any]
    masks: Masks
    recipe: Recipe | None = None
    failure: CellFailure | None = None

    @property
    def label(self) -> str:
        """``wanda · 50 % · ebft``, and the variant behind it."""
        parts = (self.table, self.pruner, target_label(str(self.target)), self.recovery, self.variant)
        return " · ".join(part for part in parts if part)


def target_label(target: str) -> str:
    """``50 %`` for ``0.5``; ``2:4`` as it is."""
    try:
        return f"{100 * float(target):g} %"
    except ValueError:
        return target


def cells_of(
    grid: Grid, recipe: str | Path | None, overrides: Mapping[str, Any], *, preset: bool
) -> tuple[Cell, ...]:
    """Every cell of the grid, tables in order; in each all recoveries of one pruner and target stand together.

    ``overrides`` beat the grid's settings; a table's own beat both, and a variant's beat the table's: they are what is
    compared.

    Args:
        grid: What is compared.
        recipe: The recipe that cells start from; None takes the grid's.
        overrides: Dotted recipe keys to values, for all cells.
        preset: The grid is a built-in one: a cell whose method there is not fails, and the others go on. In a grid of
            the user's own that is a mistake to tell of at once.

    Raises:
        UsageError: A method is unknown, a setting is unknown or out of range.
    """
    check_settings((key for key in overrides if not key.startswith("evaluation.")), "--set")
    source = recipe if recipe is not None else grid.recipe
    found = []
    for table in grid.tables:
        for cell in _places(grid, table):
            try:
                found.append(_with_recipe(cell, source, {**grid.settings, **overrides, **cell.settings}))
            except ReportedError as error:
                if not preset:
                    raise
                found.append(replace(cell, failure=failure_of(error)))
    return tuple(_without_repetitions(found))


def _places(grid: Grid, table: GridTable) -> Iterator[Cell]:
    """Each place of a table, without its recipe."""
    for target in table.targets:
        for pruner in dict.fromkeys(table.pruners):
            for recovery in dict.fromkeys(table.recoveries):
                for variant in table.variants or (_UNNAMED,):
                    own = _relevant(variant.settings, recovery)
                    named = variant.name if own and variant is not _UNNAMED else ""
                    settings = {**_relevant(table.settings, recovery), **own}
                    yield Cell(table.name, pruner, recovery, target, named, settings, grid.masks)


def _relevant(settings: Mapping[str, Any], recovery: str) -> dict[str, Any]:
    """Settings without those of a recovery that there is not: variants of one would all be the same cell."""
    return {
        key: value for key, value in settings.items() if recovery != "none" or not key.startswith("recovery.")
    }


def _with_recipe(cell: Cell, source: str | Path | None, settings: Mapping[str, Any]) -> Cell:
    _check_method("pruner", cell.pruner, methods_of(PruningRecipe))
    _check_method("recovery", cell.recovery, methods_of(RecoveryRecipe))
    key, value = ("pattern", str(cell.target)) if cell.target.is_n_m else ("sparsity", cell.target.sparsity)
    axes = {"pruning.method": cell.pruner, "recovery.method": cell.recovery, f"pruning.{key}": value}
    return replace(cell, recipe=read_recipe(source, {**settings, **axes}))


def methods_of(section: type[PruningRecipe] | type[RecoveryRecipe]) -> tuple[str, ...]:
    """The names of all methods that a recipe's section can have."""
    return get_args(section.model_fields["method"].annotation)


def _check_method(role: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UsageError(
            "E-GRID-METHOD",
            f"there is no {role} named {name}",
            f"{did_you_mean(name, known)}there are {', '.join(known)}",
        )


def _without_repetitions(cells: list[Cell]) -> Iterator[Cell]:
    """The cells, of those that say the same in one table only the first."""
    told = set()
    for cell in cells:
        if (cell.table, cell.label) not in told:
            told.add((cell.table, cell.label))
            yield cell
