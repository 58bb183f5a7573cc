"""Several processes share a run: they hold the same bits, and make what one process makes but for rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from faults.rank_agreement import agreement, run_passes

from compressor.errors import UsageError
from compressor.ranks import ALONE, Ranks, deal
from compressor.run.launch import launched, may_tell

CHECKS = Path(__file__).parent / "faults" / "rank_checks.py"
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
SHORT = "default"  # overlapping windows, rates by trial, the finish: all that decides something

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")


class Ranked(Ranks):
    """Rank 0 of three, as far as sharing out goes."""

    world = 3


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Passes by one, two and four processes."""
    folder = tmp_path_factory.mktemp("passes")
    tiny_models.save_variant(folder / "model", "llama")
    run_passes(folder, (1, 2, 4), [SHORT])
    return folder


def test_environment_without_a_launcher_is_one_process() -> None:
    """No variable, or a world of one, and the run is as it always was."""
    assert launched({}) is None
    assert launched({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert may_tell(ValueError())


def test_environment_of_torchrun_is_read() -> None:
    """Place, machine and how long to wait."""
    launch = launched(
        {**TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "BLOCKPRESS_RANKS_TIMEOUT": "60"}
    )
    assert launch is not None
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == (1, 4, 1, 2)
    assert launch.timeout_s == 60


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": ""},
        {"RANK": "4"},
        {"WORLD_SIZE": "four"},
        {"BLOCKPRESS_RANKS_TIMEOUT": "soon"},
        {"MASTER_ADDR": ""},
    ],
)
def test_environment_that_makes_no_sense_is_refused(change: dict[str, str]) -> None:
    """Never taken for a run of one process, of which there would then be several."""
    with pytest.raises(UsageError, match="E-RANKS-ENVIRONMENT"):
        launched({**TORCHRUN, **change})


def test_windows_are_shared_out_once_and_evenly() -> None:
    """Every window has one holder, and no rank holds two more than another."""
    ranks = Ranked()
    shares = [ranks.share(13, rank) for rank in range(3)]
    assert [row for share in shares for row in share] == list(range(13))
    assert {len(share) for share in shares} == {4, 5}
    assert [ranks.holder(row, 13) for row in (0, 4, 12)] == [0, 1, 2]
    assert ALONE.share(13) == range(13)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 12], [12, 11, 10], [5], [7, 0, 3, 11, 2, 9, 1, 4]])
def test_batch_is_dealt_evenly_whoever_holds_its_windows(rows: list[int]) -> None:
    """Each row once, in the order of the batch, and no rank has two more than another."""
    parts = deal(rows, 13, Ranked())
    assert sorted(row for part in parts for row in part) == sorted(rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part == [row for row in rows if row in part] for part in parts)
    assert deal(rows, 13, ALONE) == [rows]


@forks
def test_ranks_add_up_deal_and_tell() -> None:
    """Gradients, statistics, windows, errors and digests between two processes."""
    ended = subprocess.run([sys.executable, str(CHECKS)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


@forks
@pytest.mark.parametrize("world", [2, 4])
def test_processes_hold_the_same_bits_and_make_what_one_makes(world: int, passes: Path) -> None:
    """The first block's masks are the same, the others' but for one place in a thousand, perplexity but for 0.2 %."""
    found = agreement(passes, SHORT, world)
    assert found.on_ranks
    assert found.masks[0] == 1
    assert min(found.masks) >= 0.999
    assert found.perplexity <= 0.002
