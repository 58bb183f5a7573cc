"""Files that are made to mislead, through the real command line: the right id and exit code, nothing lost or left."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_bench import check_text, nothing_changes, open_bench, time_limit
from bad_inputs import Bench
from cli_fakes import Terminal
from hostile_cases import HostileCase
from hostile_commands import CASES
from workshop import Workshop


@pytest.fixture
def bench(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A model, two texts and an older output, to be spoiled, and a secret that nobody may read."""
    opened = open_bench(workshop, tmp_path, monkeypatch)
    (opened.home / "secret").write_text("the secret", encoding="utf-8")
    return opened


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_case_is_refused(capsys: pytest.CaptureFixture[str], bench: Bench, case: HostileCase) -> None:
    """Each ends with its id and exit code in two lines; every file, and every folder, stays as it was."""
    case.spoil(bench)
    with nothing_changes(bench), time_limit(200):
        ended = Terminal(capsys).run(*case.command_line(bench), "-q")
    check_text(ended, (case.error_id, case.exit_code), case.says)
    assert "the secret" not in ended.err
