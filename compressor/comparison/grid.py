"""The grid of a comparison: what is compared with what. YAML in; unknown keys are errors."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.errors import UsageError
from compressor.recipe import EvaluationRecipe
from compressor.recipe_file import check_key
from compressor.sparsity import SparsityPattern
from compressor.yaml_text import read_yaml

PRESETS_FOLDER = Path(__file__).parent / "grids"
DEFAULT_PRESET = "quick"

# The recipe keys that the grid itself sets, and how the grid calls them.
AXES = {
    "pruning.method": "pruners",
    "recovery.method": "recoveries",
    "pruning.sparsity": "sparsities",
    "pruning.pattern": "patterns",
}

Masks = Literal["shared", "own"]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=80)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Variant(_Section):
    """Settings under a name, compared with each other: a learning rate, a number of windows."""

    name: Name
    settings: dict[str, Any] = Field(default={}, alias="set")


class GridTable(_Section):
    """One table: each pruner with each recovery at each sparsity and pattern, in each variant."""

    name: str = ""
    pruners: Annotated[tuple[Name, ...], Field(min_length=1)]
    recoveries: Annotated[tuple[Name, ...], Field(min_length=1)]
    sparsities: tuple[Share, ...] = ()
    patterns: tuple[Name, ...] = ()
    settings: dict[str, Any] = Field(default={}, alias="set")
    variants: tuple[Variant, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> GridTable:
        if not self.sparsities and not self.patterns:
            raise ValueError("sparsities and patterns are both empty: nothing to prune to")
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError("two variants have the same name")
        return self

    @property
    def targets(self) -> tuple[SparsityPattern, ...]:
        """Sparsities, then patterns.

        Raises:
            UsageError: A pattern is none.
        """
        shares = (SparsityPattern.unstructured(share) for share in dict.fromkeys(self.sparsities))
        patterns = (SparsityPattern.parse(pattern) for pattern in dict.fromkeys(self.patterns))
        return (*shares, *patterns)


class Grid(_Section):
    """All tables, and what holds for each of them.

    Attributes:
        recipe: The recipe that every cell starts from; None takes the built-in ``default``.
        masks: ``shared``: the recoveries of one pruner start from the very same pruned model, that of the pass without
            recovery. ``own``: each prunes along its own repaired blocks, as ``compress run`` does.
        evaluations: The texts that perplexity is measured on; none takes the recipe's.
        settings: Recipe settings of every cell.
        tables: What is compared.
    """

    recipe: str | None = None
    masks: Masks = "shared"
    evaluations: tuple[EvaluationRecipe, ...] = ()
    settings: dict[str, Any] = Field(default={}, alias="set")
    tables: Annotated[tuple[GridTable, ...], Field(min_length=1)]


def presets() -> dict[str, Path]:
    """Name and file of each grid that the package ships."""
    return {path.stem: path for path in sorted(PRESETS_FOLDER.glob("*.yaml"))}


def read_preset(name: str) -> Grid:
    """The built-in grid of that name.

    Raises:
        UsageError: E-GRID-NOT-FOUND: there is none.
    """
    known = presets()
    if name not in known:
        raise UsageError(
            "E-GRID-NOT-FOUND",
            f"no preset named {name}",
            f"{did_you_mean(name, known)}presets: {', '.join(known)}",
        )
    return read_grid(known[name])


def read_grid(path: str | Path) -> Grid:
    """The grid of a YAML file. A file without ``tables`` is one table.

    Raises:
        UsageError: The file is absent or no YAML mapping, a key is unknown, a value is out of range.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise UsageError(
            "E-GRID-NOT-FOUND",
            f"there is no grid file {path}",
            f"give a YAML file, or --preset {'|'.join(presets())}",
        )
    try:
        tree = read_yaml(path)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        first = " ".join(str(error).split())
        raise UsageError(
            "E-GRID-SYNTAX", f"{path.name} is not plain YAML: {first}", "mend the file; tags are not allowed"
        ) from None
    if not isinstance(tree, dict):
        raise UsageError(
            "E-GRID-SYNTAX",
            f"{path.name} must be a mapping with pruners, recoveries and sparsities, got {type(tree).__name__}",
            "see compare in README.md for an example",
        )
    return parse_grid(tree, path.name)


def parse_grid(tree: Mapping[str, Any], origin: str = "the grid") -> Grid:
    """The grid of a nested mapping; ``origin`` is where it comes from, for messages.

    Raises:
        UsageError: E-GRID-KEY: a key is unknown, the nearest known one is named; E-GRID-VALUE: a value is out of range;
            E-GRID-AXIS: a setting is one that the grid itself varies; E-RECIPE-KEY: a setting is no key of a recipe.
    """
    fields = dict(tree)
    flat = "tables" not in fields
    if flat:
        own = {key: fields.pop(key) for key in list(fields) if key in _keys(GridTable) and key != "set"}
        fields["tables"] = [own]
    try:
        grid = Grid.model_validate(fields)
    except ValidationError as error:
        raise _usage_error(error, origin, flat) from None
    for settings in _all_settings(grid):
        check_settings(settings, origin)
    for table in grid.tables:
        assert table.targets  # a pattern that is none is told of here, before anything is opened
    return grid


def check_settings(settings: Iterable[str], origin: str) -> None:
    """Do nothing when every dotted key is one that cells may set.

    Raises:
        UsageError: E-GRID-AXIS, E-GRID-EVALUATION, E-RECIPE-KEY.
    """
    for key in settings:
        check_key(key, origin)
        if key in AXES:
            raise UsageError(
                "E-GRID-AXIS",
                f"{origin}: {key} is what the grid varies",
                f"name its values under {AXES[key]}",
            )
        if key.partition(".")[0] in ("evaluation", "gates"):
            raise UsageError(
                "E-GRID-EVALUATION",
                f"{origin}: {key} cannot differ between cells, or they could not be compared",
                "name the texts once, under evaluations or with --eval-data; a comparison has no gates",
            )


def did_you_mean(name: str, known: Collection[str]) -> str:
    """``did you mean wanda? `` for a name that is close to a known one, else nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _all_settings(grid: Grid) -> Iterable[Mapping[str, Any]]:
    yield grid.settings
    for table in grid.tables:
        yield table.settings
        for variant in table.variants:
            yield variant.settings


def _keys(section: type[BaseModel]) -> list[str]:
    """The keys of a section as they stand in a file."""
    return [field.alias or name for name, field in section.model_fields.items()]


def _usage_error(error: ValidationError, origin: str, flat: bool) -> UsageError:
    """The first trouble, in the words of the file: one without ``tables`` never wrote ``tables.0``."""
    found = error.errors(include_url=False)
    first = next(
        (one for one in found if one["type"] == "extra_forbidden"), found[0]
    )  # a misspelt key is missing too
    place = [str(part) for part in first["loc"]]
    if flat and place[:1] == ["tables"]:
        place = place[2:]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = _keys(_section_of(first["loc"]))
        if flat and len(place) == 1:
            known = [key for key in _keys(GridTable) if key != "set"] + [
                key for key in _keys(Grid) if key != "tables"
            ]
        near = difflib.get_close_matches(place[-1], known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"keys are {', '.join(known)}"
        return UsageError("E-GRID-KEY", f"{origin}: unknown key {key}", advice)
    if first["type"] == "missing":
        return UsageError("E-GRID-VALUE", f"{origin}: {key} is missing", f"add {place[-1]}")
    what = str(first["msg"]).removeprefix("Value error, ")
    got = "" if isinstance(first["input"], (dict, BaseModel)) else f"; got {repr(first['input'])[:200]}"
    advice = "see compare in README.md for an example"
    if "patterns" in place and isinstance(first["input"], int):
        advice = 'put a pattern in quotes, as in patterns: ["2:4"]: YAML reads 2:4 as minutes and seconds'
    return UsageError("E-GRID-VALUE", f"{origin}: {f'{key}: ' if key else ''}{what}{got}", advice)


def _section_of(location: Sequence[int | str]) -> type[BaseModel]:
    """The section that a place in the tree lies in."""
    names = [part for part in location[:-1] if isinstance(part, str)]
    sections: dict[str, type[BaseModel]] = {
        "tables": GridTable,
        "variants": Variant,
        "evaluations": EvaluationRecipe,
    }
    return sections[names[-1]] if names else Grid
