"""The page of error ids and the exit codes agree with the source."""

from __future__ import annotations

import pickle

import pytest
from error_table import PAGE, mentioned_ids, render

from compressor import errors
from exporters.errors import ReportedError

EXIT_CODES = {
    "UsageError": 2,
    "InputRefused": 3,
    "GateFailed": 4,
    "OutOfResources": 5,
    "OutputRefused": 6,
    "HubError": 7,
    "StoppedSafely": 75,
}


def test_errors_page_lists_every_id() -> None:
    """docs/errors.md is what the source makes of it; run tests/error_table.py after adding an error."""
    assert PAGE.read_text(encoding="utf-8") == render()
    assert len(mentioned_ids()) > 50


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_errors_carry_their_exit_code(name: str, code: int) -> None:
    """Each class of the tree has the exit code that the page promises."""
    assert getattr(errors, name).exit_code == code


def test_errors_survive_pickling() -> None:
    """An error crosses a process boundary with id, message and remedy."""
    error = pickle.loads(pickle.dumps(errors.InputRefused("E-EXAMPLE", "what came", "do this")))
    assert (error.error_id, error.message, error.remedy) == ("E-EXAMPLE", "what came", "do this")
    assert isinstance(error, ReportedError)
    assert error.exit_code == 3
