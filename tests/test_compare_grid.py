"""The grid of a comparison: what a file may say, what it is told when it says something else, and its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor.comparison import grid as grids
from compressor.comparison.cells import cells_of
from compressor.comparison.grid import parse_grid, presets, read_grid, read_preset
from compressor.errors import UsageError

LISTS = {"pruners": ["wanda", "magnitude"], "recoveries": ["none", "ebft"], "sparsities": [0.5]}


def labels(tree: dict[str, Any], **overrides: Any) -> list[str]:
    """The labels of a grid's cells."""
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return [cell.label for cell in cells_of(parse_grid(tree), None, settings, preset=False)]


def test_grid_cells_are_the_product_of_the_lists() -> None:
    """Each target with each pruner with each recovery; recoveries of one pruner stand together."""
    assert labels({**LISTS, "patterns": ["2:4"]}) == [
        "wanda · 50 % · none",
        "wanda · 50 % · ebft",
        "magnitude · 50 % · none",
        "magnitude · 50 % · ebft",
        "wanda · 2:4 · none",
        "wanda · 2:4 · ebft",
        "magnitude · 2:4 · none",
        "magnitude · 2:4 · ebft",
    ]


def test_grid_cells_carry_their_recipe() -> None:
    """A cell's recipe has its methods and target; variants beat tables, tables beat options, options beat the grid."""
    tree = {
        "set": {"recovery.epochs": 1, "seed": 1},
        "tables": [
            {
                "pruners": ["wanda"],
                "recoveries": ["ebft"],
                "patterns": ["2:4"],
                "set": {"recovery.batch_size": 2, "recovery.lr": 0.1},
                "variants": [{"name": "slow", "set": {"recovery.lr": 0.001}}],
            }
        ],
    }
    (cell,) = cells_of(parse_grid(tree), None, {"seed": 2, "recovery.batch_size": 9}, preset=False)
    assert cell.recipe is not None
    assert (cell.recipe.pruning.method, cell.recipe.pruning.pattern) == ("wanda", "2:4")
    recovery = cell.recipe.recovery
    assert (recovery.epochs, recovery.batch_size, recovery.lr, cell.recipe.seed) == (1, 2, 0.001, 2)
    assert cell.settings == {"recovery.batch_size": 2, "recovery.lr": 0.001}


def test_grid_variants_of_a_recovery_do_not_repeat_the_cell_without_one() -> None:
    """Two learning rates are two cells of EBFT and one of pruning alone; a variant of pruning is two of both."""
    rates = [{"name": "low", "set": {"recovery.lr": 1e-4}}, {"name": "high", "set": {"recovery.lr": 1e-2}}]
    one = {**LISTS, "pruners": ["wanda"]}
    assert labels({**one, "variants": rates}) == [
        "wanda · 50 % · none",
        "wanda · 50 % · ebft · low",
        "wanda · 50 % · ebft · high",
    ]
    sizes = [{"name": "few", "set": {"calibration.num_samples": 8}}, {"name": "usual"}]
    assert labels({**one, "variants": sizes}) == [
        "wanda · 50 % · none · few",
        "wanda · 50 % · none",
        "wanda · 50 % · ebft · few",
        "wanda · 50 % · ebft",
    ]


@pytest.mark.parametrize(
    ("tree", "error_id", "message", "remedy"),
    [
        ({**LISTS, "pruner": ["wanda"]}, "E-GRID-KEY", "unknown key pruner", "did you mean pruners?"),
        ({"tables": [{**LISTS, "sets": {}}]}, "E-GRID-KEY", "tables.0.sets", "did you mean set?"),
        ({**LISTS, "variants": [{"nam": "a"}]}, "E-GRID-KEY", "variants.0.nam", "did you mean name?"),
        ({"recoveries": ["none"], "sparsities": [0.5]}, "E-GRID-VALUE", "pruners is missing", "add pruners"),
        ({**LISTS, "sparsities": [1.5]}, "E-GRID-VALUE", "sparsities.0: ", "README"),
        ({**LISTS, "sparsities": []}, "E-GRID-VALUE", "both empty", "README"),
        ({**LISTS, "patterns": [124]}, "E-GRID-VALUE", "patterns.0: ", 'quotes, as in patterns: ["2:4"]'),
        ({**LISTS, "patterns": ["4:2"]}, "E-PATTERN-RANGE", "0 < N < M", "2:4"),
        ({**LISTS, "set": {"recovery.l": 1}}, "E-RECIPE-KEY", "recovery.l", "did you mean recovery.lr?"),
        ({**LISTS, "set": {"recovery.method": "none"}}, "E-GRID-AXIS", "the grid varies", "recoveries"),
        ({**LISTS, "set": {"evaluation.source": "a"}}, "E-GRID-EVALUATION", "cannot differ", "--eval-data"),
        ({**LISTS, "pruners": ["wnda"]}, "E-GRID-METHOD", "no pruner named wnda", "did you mean wanda?"),
        ({**LISTS, "recoveries": ["ebtf"]}, "E-GRID-METHOD", "recovery named ebtf", "did you mean ebft?"),
        ({**LISTS, "set": {"recovery.epochs": 0}}, "E-RECIPE-VALUE", "recovery.epochs", "default.yaml"),
        (
            {**LISTS, "variants": [{"name": "a"}, {"name": "a", "set": {"seed": 1}}]},
            "E-GRID-VALUE",
            "two variants have the same name",
            "README",
        ),
    ],
)
def test_grid_errors_name_the_place_and_the_way_out(
    tree: dict[str, Any], error_id: str, message: str, remedy: str
) -> None:
    """Unknown keys name the nearest known one; values out of range name their key."""
    with pytest.raises(UsageError) as caught:
        labels(tree)
    assert caught.value.error_id == error_id
    assert message in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "error_id"),
    [
        ("- wanda", "E-GRID-SYNTAX"),
        ("pruners: [", "E-GRID-SYNTAX"),
        ("a: !!python/name:os.system", "E-GRID-SYNTAX"),
    ],
)
def test_grid_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, error_id: str) -> None:
    """A list, broken YAML and tags are all told of as bad syntax."""
    (tmp_path / "grid.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_grid(tmp_path / "grid.yaml")
    assert caught.value.error_id == error_id


def test_grid_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    """A file or preset that does not exist is told of with what there is."""
    with pytest.raises(UsageError, match="no grid file") as caught:
        read_grid(tmp_path / "grid.yaml")
    assert "--preset" in caught.value.remedy
    with pytest.raises(UsageError, match="no preset named papr") as caught:
        read_preset("papr")
    assert "did you mean paper?" in caught.value.remedy


def test_grid_presets_can_be_read() -> None:
    """Every shipped grid parses; paper has the paper's sparsities, patterns and structured cells."""
    assert set(presets()) == {"paper", "quick"}
    assert len(cells_of(read_preset("quick"), None, {}, preset=True)) == 12
    found = {cell.label for cell in cells_of(read_preset("paper"), None, {}, preset=True)}
    assert {f"unstructured · sparsegpt · {share} % · ebft" for share in (50, 60, 70, 80, 90)} <= found
    assert {"N:M · magnitude · 2:4 · dsnot", "N:M · wanda · 4:8 · none"} <= found
    assert {f"structured · flap · 26 % · {method}" for method in ("lora", "ebft")} <= found


def test_grid_preset_with_a_method_that_is_not_there_fails_that_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A built-in grid may name a method of a later version: its cell says so and the others are as ever."""
    text = "pruners: [wanda]\nrecoveries: [none, telepathy]\nsparsities: [0.5]\n"
    (tmp_path / "future.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(grids, "PRESETS_FOLDER", tmp_path)
    good, bad = cells_of(read_preset("future"), None, {}, preset=True)
    assert good.recipe is not None
    assert good.failure is None
    assert bad.recipe is None
    assert bad.failure is not None
    assert bad.failure.error_id == "E-GRID-METHOD"
    assert "telepathy" in bad.failure.message
