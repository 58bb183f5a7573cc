"""The list of what can go wrong is tried whole, and no two cases are one."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from bad_exports import EXPORTS
from bad_inputs import MODELS, TEXTS
from bad_options import OUTPUTS, PRUNING, SETTINGS
from contract_cases import TRIED
from error_table import mentioned_ids
from hostile_commands import CASES

TESTS = Path(__file__).parent
INPUTS = (*MODELS, *TEXTS, *PRUNING, *SETTINGS, *OUTPUTS, *CASES)
NAMES = [case.name for case in (*INPUTS, *EXPORTS)]
KINDS = {(type(case), case.name) for case in (*INPUTS, *EXPORTS)}


@functools.cache
def functions(file: str) -> set[str]:
    """The names of a test file's functions."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("trouble", TRIED)
def test_contract_case_is_tried(trouble: str) -> None:
    """Every test and case that is said to try it is there."""
    for name in TRIED[trouble]:
        file, _, function = name.partition("::")
        assert function in functions(file) if function else name in NAMES, name


def test_contract_cases_are_many_and_all_different() -> None:
    """Each of the hundreds of cases has a name of its own, and an id that the program knows."""
    assert len(NAMES) == len(KINDS)
    assert len(NAMES) >= 350
    known = mentioned_ids()
    assert {case.error_id for case in INPUTS} <= known
    assert len({case.error_id for case in INPUTS}) >= 50
