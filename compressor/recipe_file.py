"""Recipes from YAML and from dotted keys; unknown keys and wrong values are errors that name what to do."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from compressor.errors import UsageError
from compressor.recipe import Recipe
from compressor.yaml_text import read_yaml

BUILT_IN_FOLDER = Path(__file__).parent / "recipes"

# A key that is given on top, and the one of its section in the file that it stands in for.
_CLEARED = {
    "pruning.sparsity": "pattern",
    "pruning.pattern": "sparsity",
    "recovery.epochs": "epochs_before_finish",
}


def built_in_recipes() -> dict[str, Path]:
    """Name and file of each recipe that the package ships."""
    return {path.stem: path for path in sorted(BUILT_IN_FOLDER.glob("*.yaml"))}


def read_recipe(source: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a file or built-in name, with dotted overrides (``{"recovery.lr": 1e-3}``) on top.

    Each section knows which of its keys the file or the overrides set; those of a built-in recipe do not count.

    Args:
        source: A YAML file, the name of a built-in recipe, or ``None`` for ``default``.
        overrides: Dotted key to value; a value beats the file, the file beats the defaults. Setting one of
            ``pruning.sparsity`` and ``pruning.pattern`` clears the other one of the file, and
            ``recovery.epochs`` what the file has for runs with a finish.

    Raises:
        UsageError: The file is absent or no YAML mapping, a key is unknown, a value is out of range.
    """
    tree = _read_tree("default" if source is None else source)
    overrides = dict(overrides or {})
    if "pruning.sparsity" in overrides and "pruning.pattern" in overrides:
        raise UsageError(
            "E-SPARSITY-AND-PATTERN",
            "sparsity and pattern exclude each other",
            "give --sparsity or --pattern, not both",
        )
    for key, other in _CLEARED.items():
        section = tree.get(key.partition(".")[0])
        if key in overrides and isinstance(section, dict):
            section.pop(other, None)
    for key, value in overrides.items():
        check_key(key, "overrides")
        _set_dotted(tree, key, value)
    recipe = parse_recipe(tree, str(source or "default"), overrides)
    if source is None or not os.path.isfile(source):
        _forget_all_but(overrides, recipe)
    return recipe


def read_overrides(overrides: Mapping[str, Any]) -> Recipe:
    """The defaults with dotted overrides on top; each section knows which of its keys were set.

    Raises:
        UsageError: A key is unknown or a value is out of range.
    """
    tree: dict[str, Any] = {}
    for key, value in overrides.items():
        check_key(key, "overrides")
        _set_dotted(tree, key, value)
    return parse_recipe(tree, given=overrides)


def parse_recipe(tree: Mapping[str, Any], origin: str = "recipe", given: Collection[str] = ()) -> Recipe:
    """The recipe of a nested mapping.

    Args:
        tree: Sections and their keys.
        origin: Where the tree comes from, for messages.
        given: Dotted keys that the caller has set on top; what is wrong with one is not blamed on ``origin``.

    Raises:
        UsageError: A key is unknown (the nearest known one is named) or a value is out of range.
    """
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        raise _usage_error(error, origin, given) from None


def _read_tree(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        known = built_in_recipes()
        if str(source) not in known:
            near = difflib.get_close_matches(str(source), known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                "E-RECIPE-NOT-FOUND",
                f"no recipe file or built-in recipe named {source}",
                f"{hint}built-in recipes: {', '.join(known)}",
            )
        path = known[str(source)]
    try:
        tree = read_yaml(path)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        first = " ".join(str(error).split())
        raise UsageError(
            "E-RECIPE-SYNTAX",
            f"{path.name} is not plain YAML: {first}",
            "mend the file; tags are not allowed",
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(
            "E-RECIPE-SYNTAX",
            f"{path.name} must be a mapping of sections, got {type(tree).__name__}",
            "start from recipes/default.yaml",
        )
    return tree


def _forget_all_but(given: Collection[str], section: BaseModel, prefix: str = "") -> None:
    """Leave only those keys as set that ``given`` names, or whose section it names."""
    for name in tuple(section.model_fields_set):
        value = getattr(section, name)
        if prefix + name in given:
            continue
        if isinstance(value, BaseModel):
            _forget_all_but(given, value, f"{prefix}{name}.")
        else:
            section.model_fields_set.discard(name)


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise UsageError(
                "E-RECIPE-KEY",
                f"{key}: {section} is not a section of the recipe",
                "see recipes/default.yaml for the keys",
            )
        node = child
    node[leaf] = value


def check_key(key: str, origin: str) -> None:
    """Do nothing when a recipe can have the dotted ``key``; ``origin`` is who named it, for the message.

    Raises:
        UsageError: E-RECIPE-KEY: it cannot; the nearest known key is named.
    """
    known = list(recipe_keys())
    if key not in known:
        raise UsageError("E-RECIPE-KEY", f"{origin}: unknown key {key}", _suggestion(key, known))


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe can have, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from recipe_keys(annotation, f"{prefix}{name}.")


def _usage_error(error: ValidationError, origin: str, given: Collection[str] = ()) -> UsageError:
    """The first trouble, with the recipe it came from unless the caller set that key."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    known = list(recipe_keys())
    while len(place) > 1 and ".".join(place) not in known and first["type"] != "extra_forbidden":
        place.pop()  # an index, or the name of one alternative of a union
    key = ".".join(place)
    on_top = any(key == one or key.startswith(f"{one}.") for one in given)
    where = "" if on_top else f"{origin}: "
    if first["type"] == "extra_forbidden":
        return UsageError("E-RECIPE-KEY", f"{where}unknown key {key}", _suggestion(key, known))
    if key == "pruning.sparsity":
        return UsageError(
            "E-SPARSITY-RANGE",
            f"{where}sparsity must be between 0 and 1, both excluded; got {_shown(str(first['input']))}",
            "give a share such as 0.5 for 50 %",
        )
    if first["type"] == "string_pattern_mismatch" and key == "pruning.pattern":
        return UsageError(
            "E-PATTERN-SYNTAX",
            f"{where}a pattern is N:M, two whole numbers; got {_shown(repr(first['input']))}",
            "give a pattern such as 2:4",
        )
    if first["type"] == "value_error" and key == "pruning":
        return UsageError(
            "E-SPARSITY-AND-PATTERN", f"{where}sparsity and pattern exclude each other", "keep one of the two"
        )
    return UsageError(
        "E-RECIPE-VALUE",
        f"{where}{key}: {first['msg']}; got {_shown(repr(first['input']))}",
        "see recipes/default.yaml for each key's range",
    )


def _shown(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _suggestion(key: str, known: Sequence[str]) -> str:
    """The key of that name in another section, else the nearest: of the same section, of any; else a list."""
    section, _, leaf = key.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    namesakes = [other for other in known if other.rpartition(".")[2] == leaf]
    for candidates in (namesakes, siblings, known):
        leaves = {other.rpartition(".")[2]: other for other in reversed(candidates)}
        near = difflib.get_close_matches(leaf, leaves, n=1)
        if near:
            return f"did you mean {leaves[near[0]]}?"
    sections = {other.rpartition(".")[0] for other in known}
    while section not in sections:  # the whole recipe, "", is one
        section = section.rpartition(".")[0]
    names = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    return f"{section or 'a recipe'} has {', '.join(names)}"
