"""The recipe: files, built-in names, overrides, and what is said about a wrong key or value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.errors import UsageError
from compressor.recipe import Recipe
from compressor.recipe_file import built_in_recipes, parse_recipe, read_overrides, read_recipe, recipe_keys


def refusal(tree: dict[Any, Any]) -> UsageError:
    """The error that a tree of settings raises."""
    with pytest.raises(UsageError) as refused:
        parse_recipe(tree)
    assert refused.value.exit_code == 2
    return refused.value


def file_refusal(path: Path, text: bytes) -> UsageError:
    """The error that a file of this content raises."""
    path.write_bytes(text)
    with pytest.raises(UsageError) as refused:
        read_recipe(path)
    return refused.value


def test_recipe_built_in_ones_are_complete_and_differ() -> None:
    """Both shipped recipes parse, by name and by path, and are not the same."""
    assert list(built_in_recipes()) == ["default", "ebft-paper"]
    for name, path in built_in_recipes().items():
        assert read_recipe(name) == read_recipe(path)
    assert read_recipe("default").digest() != read_recipe("ebft-paper").digest()


def test_recipe_without_a_source_is_the_default() -> None:
    """No recipe given is the one called default."""
    assert read_recipe(None) == read_recipe("default")


def test_recipe_paper_has_the_published_settings() -> None:
    """Settings of the published code: targets of the dense block, 2e-4, ten epochs, the last step."""
    recovery = read_recipe("ebft-paper").recovery
    assert (recovery.targets, recovery.lr, recovery.epochs, recovery.selection) == ("block", 2e-4, 10, "last")
    assert read_recipe("ebft-paper").pruning.update_weights is False


def test_recipe_survives_yaml() -> None:
    """What a run saves is read back the same."""
    recipe = read_recipe("ebft-paper", {"pruning.pattern": "2:4", "gates.max_ppl_increase": 0.15})
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_recipe_digest_names_the_settings() -> None:
    """Equal settings have equal digests however they were written; another value has another."""
    assert read_recipe(None, {"recovery.batch_size": 8}).digest() == read_recipe(None).digest()
    assert read_recipe(None, {"recovery.batch_size": 9}).digest() != read_recipe(None).digest()


def test_recipe_override_beats_the_file_and_it_the_default(tmp_path: Path) -> None:
    """Three sources, each over the next."""
    path = tmp_path / "mine.yaml"
    path.write_text("recovery: {epochs: 3, batch_size: 5}\n")
    recovery = read_recipe(path, {"recovery.epochs": 4}).recovery
    assert (recovery.epochs, recovery.batch_size, recovery.loss) == (4, 5, "mse")


def test_recipe_override_of_pattern_clears_the_files_sparsity(tmp_path: Path) -> None:
    """A file's sparsity does not stand in the way of a pattern given on top, nor the other way round."""
    path = tmp_path / "mine.yaml"
    path.write_text("pruning: {sparsity: 0.6}\n")
    pruning = read_recipe(path, {"pruning.pattern": "2:4"}).pruning
    assert (pruning.sparsity, pruning.pattern) == (None, "2:4")
    path.write_text("pruning: {pattern: '2:4'}\n")
    pruning = read_recipe(path, {"pruning.sparsity": 0.5}).pruning
    assert (pruning.sparsity, pruning.pattern) == (0.5, None)


def test_recipe_overrides_alone_know_what_was_set() -> None:
    """Without a file the sections tell a key that was set from one that has its default."""
    evaluation = read_overrides({"evaluation.max_windows": 3}).evaluation
    assert evaluation.model_fields_set == {"max_windows"}
    assert evaluation.source == "python-docs"


def test_recipe_number_as_text_is_a_number() -> None:
    """YAML takes 1e-3 for a text; a learning rate is a number all the same."""
    assert yaml.safe_load("1e-3") == "1e-3"
    assert read_recipe(None, {"recovery.lr": "1e-3"}).recovery.lr == 1e-3


def test_recipe_sparsity_and_pattern_exclude_each_other() -> None:
    """In one file, or both on top."""
    assert refusal({"pruning": {"sparsity": 0.5, "pattern": "2:4"}}).error_id == "E-SPARSITY-AND-PATTERN"
    with pytest.raises(UsageError) as refused:
        read_recipe(None, {"pruning.sparsity": 0.5, "pruning.pattern": "2:4"})
    assert refused.value.error_id == "E-SPARSITY-AND-PATTERN"


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.1, float("nan"), "50%", "half"])
def test_recipe_sparsity_outside_its_range_is_refused(share: float | str) -> None:
    """Neither end is a sparsity, nor is a percentage."""
    error = refusal({"pruning": {"sparsity": share}})
    assert error.error_id == "E-SPARSITY-RANGE"
    assert str(share) in error.message


NEAREST = [
    ({"recovery": {"epoch": 1}}, "recovery.epoch", "did you mean recovery.epochs?"),
    ({"recovery": {"probe": {"epoch": 1}}}, "recovery.probe.epoch", "did you mean recovery.probe.epochs?"),
    ({"evaluation": {"sorce": "x"}}, "evaluation.sorce", "did you mean evaluation.source?"),
    ({"calibraton": {"source": "x"}}, "calibraton", "did you mean calibration?"),
    ({"sparsity": 0.5}, "sparsity", "did you mean pruning.sparsity?"),
    ({"recovery": {"sparsity": 0.5}}, "recovery.sparsity", "did you mean pruning.sparsity?"),
    ({"calibration": {"seed": 1}}, "calibration.seed", "did you mean seed?"),
    ({"export": {"zzz": 1}}, "export.zzz", "export has dtype, encoding, activation_bits, attention, opset"),
]


@pytest.mark.parametrize(("tree", "key", "remedy"), NEAREST)
def test_recipe_unknown_key_names_the_nearest(tree: dict[str, Any], key: str, remedy: str) -> None:
    """A namesake elsewhere comes first, then the nearest of the same section, then of any section."""
    error = refusal(tree)
    assert (error.error_id, error.message, error.remedy) == (
        "E-RECIPE-KEY",
        f"recipe: unknown key {key}",
        remedy,
    )


VALUES = [
    ({"recovery": {"lr": "fast"}}, "recovery.lr: "),
    ({"recovery": {"lr": -1}}, "recovery.lr: Input should be greater than 0; got -1"),
    (
        {"recovery": {"probe": {"candidates": [1, 0]}}},
        "recovery.probe.candidates: Input should be greater than 0",
    ),
    ({"recovery": {"epochs": 2.5}}, "recovery.epochs: "),
    ({"recovery": {"method": "magic"}}, "recovery.method: Input should be 'ebft', "),
    ({"pruning": "wanda"}, "pruning: "),
    ({"pruning": {"ignore": "lm_head"}}, "pruning.ignore: "),
    ({"export": {"opset": 17}}, "export.opset: Input should be greater than or equal to 18; got 17"),
    ({"seed": -1}, "seed: "),
    ({"recovery": None}, "recovery: "),
    ({1: 2}, "1: "),
]


@pytest.mark.parametrize(("tree", "says"), VALUES)
def test_recipe_wrong_value_names_the_key(tree: dict[Any, Any], says: str) -> None:
    """The message has the key as it is written, what was expected and what came."""
    error = refusal(tree)
    assert error.error_id == "E-RECIPE-VALUE"
    assert error.message.startswith(f"recipe: {says}")
    assert "; got " in error.message


def test_recipe_wrong_override_is_not_blamed_on_the_file() -> None:
    """What was set on top is told without the file's name."""
    with pytest.raises(UsageError, match=r"^E-RECIPE-VALUE: recovery\.epochs: Input") as refused:
        read_recipe("ebft-paper", {"recovery.epochs": 0})
    assert "ebft-paper" not in refused.value.message
    with pytest.raises(UsageError, match=r"recovery\.probe\.blocks: Input") as refused:
        read_recipe("ebft-paper", {"recovery.probe": {"blocks": 0}})
    assert "ebft-paper" not in refused.value.message


UNKNOWN = [
    ("foo.bar", "a recipe has pruning, recovery, finish, calibration, evaluation, export, gates, seed"),
    ("prunning.sparsity", "did you mean pruning.sparsity?"),
    ("gates.foo.bar", "gates has max_abs_error"),
]


@pytest.mark.parametrize(("key", "remedy"), UNKNOWN)
@pytest.mark.parametrize("read", [read_overrides, lambda overrides: read_recipe("ebft-paper", overrides)])
def test_recipe_unknown_override_is_not_blamed_on_the_file(read: Any, key: str, remedy: str) -> None:
    """A key that no recipe has is told whole, as it was given, with what is at hand there."""
    with pytest.raises(UsageError) as refused:
        read({key: 1})
    assert (refused.value.error_id, refused.value.message) == (
        "E-RECIPE-KEY",
        f"overrides: unknown key {key}",
    )
    assert refused.value.remedy.startswith(remedy)


def test_recipe_override_below_a_value_is_refused() -> None:
    """A key cannot have keys of its own."""
    with pytest.raises(UsageError) as refused:
        read_recipe(None, {"recovery.epochs.first": 1})
    assert refused.value.error_id == "E-RECIPE-KEY"


def test_recipe_name_that_nobody_has_lists_the_built_in_ones() -> None:
    """A typing error in a name gets the name that was meant."""
    with pytest.raises(UsageError) as refused:
        read_recipe("ebft-papr")
    assert refused.value.error_id == "E-RECIPE-NOT-FOUND"
    assert refused.value.remedy == "did you mean ebft-paper? built-in recipes: default, ebft-paper"


@pytest.mark.parametrize(
    "text", [b"a: [1", b"!!python/object:os.system {}", b"\xff\xfe\x00", b"- a\n- b\n", b"text"]
)
def test_recipe_file_that_is_no_mapping_is_refused(tmp_path: Path, text: bytes) -> None:
    """Broken YAML, tags, other encodings and other shapes are named with the file."""
    error = file_refusal(tmp_path / "mine.yaml", text)
    assert error.error_id == "E-RECIPE-SYNTAX"
    assert error.message.startswith("mine.yaml ")


def test_recipe_empty_file_is_all_defaults(tmp_path: Path) -> None:
    """A file without a key changes nothing."""
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert read_recipe(path) == Recipe()


def test_recipe_keys_reach_every_level() -> None:
    """Sections and the keys below them, down to the deepest."""
    keys = set(recipe_keys())
    assert {"seed", "recovery", "recovery.probe", "recovery.probe.candidates", "gates.min_sparsity"} <= keys


def test_recipe_pattern_that_is_none_is_refused() -> None:
    """A pattern is two numbers with a colon between them."""
    assert refusal({"pruning": {"pattern": "2-4"}}).error_id == "E-PATTERN-SYNTAX"
