"""Runs that are killed, stopped or damaged go on, and end as if nothing had happened."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from faults.full_disk import full_from
from faults.interrupted_runs import (
    KILLED,
    ForkServer,
    TinyRun,
    contents,
    fork_server,
    report_facts,
    state_of,
    tiny_run,
)

from compressor.run.state import StateFolder, StoredFile

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A process that has done the imports."""
    with fork_server(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run with overlapping windows and trials of learning rates."""
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(server: ForkServer, run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "sparse.onnx"
    ended = server.run(run.argv(out))
    assert ended.code == 0, ended.said
    return out


def assert_same(out: Path, whole: Path) -> None:
    """The files are the same to the byte, the report but for what is measured, and nothing else lies there."""
    assert contents(out) == contents(whole)
    assert report_facts(out) == report_facts(whole)
    assert sorted(os.listdir(out.parent)) == sorted(os.listdir(whole.parent))


def windows_done(out: Path) -> int:
    """What the newest commit of the state beside ``out`` says."""
    newest = max(state_of(out).glob("*.json"))
    return int(json.loads(newest.read_text(encoding="utf-8"))["content"]["windows"])


def test_run_killed_again_and_again_ends_as_if_nothing_had_happened(
    server: ForkServer, run: TinyRun, whole: Path, tmp_path: Path
) -> None:
    """Each run gets one window further, so no window is done twice but the one that was under way."""
    out, done = tmp_path / "sparse.onnx", []
    for _ in range(5):
        ended = server.run(run.argv(out), fault="blocks: before a window#2:kill")
        assert ended.code == KILLED or len(done) == 4, ended.said
        if ended.code == KILLED:
            done.append(windows_done(out))
    assert done == [1, 2, 3, 4]
    assert ended.code == 0, ended.said
    assert_same(out, whole)


def test_run_that_is_asked_to_stop_commits_and_tells_how_to_go_on(
    server: ForkServer, run: TinyRun, tmp_path: Path
) -> None:
    """The first SIGINT ends it after the window, with 75; the same command begins where it ended."""
    out = tmp_path / "sparse.onnx"
    ended = server.run(run.argv(out), fault="blocks: before a window#2:interrupt")
    assert ended.code == 75
    assert "E-STOPPED" in ended.said
    assert "run the same command again" in ended.said
    assert windows_done(out) == 2
    assert sorted(os.listdir(tmp_path)) == [".sparse.onnx.state"]
    again = server.run(run.argv(out), fault="blocks: before a window:kill")
    assert "stopped behind block 2 of 4: going on from there" in again.said


def test_full_disk_leaves_the_commit_before(server: ForkServer, run: TinyRun, tmp_path: Path) -> None:
    """Where a commit cannot be written the run ends with 5, and goes on from the one before."""
    out = tmp_path / "sparse.onnx"
    for point in ("state: before the commit#2", "state: before a file#3"):
        ended = server.run(run.argv(out), fault=f"{point}:enospc")
        assert ended.code == 5, ended.said
        assert "E-DISK-FULL" in ended.said
        assert windows_done(out) == 1


@pytest.mark.parametrize("number", [1, 10, 90])  # of the state's first file, of another, of the export
def test_disk_that_takes_no_more_ends_with_5(
    server: ForkServer, run: TinyRun, whole: Path, tmp_path: Path, number: int
) -> None:
    """Whoever writes tells it in a way of his own: Python does, and safetensors, which writes its files by itself."""
    if not server.fills_disks:
        pytest.skip("no C compiler, or not Linux")
    out = tmp_path / "sparse.onnx"
    ended = server.run(run.argv(out), environment=full_from(number, tmp_path))
    assert ended.code == 5, ended.said
    assert "E-DISK-FULL" in ended.said
    assert os.listdir(tmp_path) == [state_of(out).name]
    if number == 90:
        assert server.run(run.argv(out)).code == 0
        assert_same(out, whole)


def test_damaged_commit_falls_back_to_the_one_before(
    server: ForkServer, run: TinyRun, whole: Path, tmp_path: Path
) -> None:
    """One flipped byte in a file of the newest commit: the run says so and does that window again."""
    out = tmp_path / "sparse.onnx"
    assert server.run(run.argv(out), fault="blocks: after a window#4:kill").code == KILLED
    (states,) = state_of(out).glob("window-4-states.safetensors")
    content = bytearray(states.read_bytes())
    content[-1] ^= 1
    states.write_bytes(content)
    ended = server.run(run.argv(out))
    assert ended.code == 0, ended.said
    assert "damaged: the one before it is used" in ended.said
    assert_same(out, whole)


def test_state_of_other_settings_is_refused_with_what_differs(
    server: ForkServer, run: TinyRun, tmp_path: Path
) -> None:
    """Nothing of it is lost; with --resume never it is, and a new run begins."""
    out = tmp_path / "sparse.onnx"
    assert server.run(run.argv(out), fault="blocks: after a window:kill").code == KILLED
    for choice in ("auto", "required"):
        refused = server.run(run.argv(out, "--seed=7", f"--resume={choice}"))
        assert refused.code == 6
        assert "E-RESUME-MISMATCH" in refused.said
        assert "seed 0 -> 7" in refused.said
        assert windows_done(out) == 1
    anew = server.run(run.argv(out, "--seed=7", "--resume=never"), fault="state: before a file:kill")
    assert anew.code == KILLED
    assert not list(state_of(out).glob("*.json"))


def test_required_state_that_is_not_there_is_refused(
    server: ForkServer, run: TinyRun, tmp_path: Path
) -> None:
    """A pipeline that counts on going on does not begin anew without a word."""
    refused = server.run(run.argv(tmp_path / "sparse.onnx", "--resume=required"))
    assert refused.code == 6
    assert "E-RESUME-NONE" in refused.said
    assert os.listdir(tmp_path) == []


def test_finished_run_says_so_and_does_nothing(server: ForkServer, run: TinyRun, whole: Path) -> None:
    """The same command on its own output ends with 0; other settings, or a changed byte, are refused."""
    before = contents(whole)
    again = server.run(run.argv(whole))
    assert again.code == 0, again.said
    assert "the output of this very run already" in again.said
    other = server.run(run.argv(whole, "--seed=7"))
    assert other.code == 6
    assert "E-OUTPUT-EXISTS" in other.said
    assert contents(whole) == before


def test_finished_output_with_a_changed_byte_is_not_taken_for_the_run_s(
    server: ForkServer, run: TinyRun, whole: Path
) -> None:
    """The hashes of the manifest are looked at."""
    masks = whole.with_suffix(".hf") / "masks.safetensors"
    content = masks.read_bytes()
    try:
        masks.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused = server.run(run.argv(whole))
    finally:
        masks.write_bytes(content)
    assert refused.code == 6
    assert "E-OUTPUT-EXISTS" in refused.said


def test_processes_that_lose_one_end_and_any_number_goes_on(
    server: ForkServer, run: TinyRun, tmp_path: Path
) -> None:
    """A killed process ends the others with 5 and an id, told once; one process goes on behind what rank 0 kept."""
    out = tmp_path / "sparse.onnx"
    root, killed = server.run_ranks(run.argv(out), 2, faults={1: "blocks: before a window#3:kill"})
    assert (root.code, killed.code) == (5, KILLED), root.said
    assert "E-RANK-LOST" in root.said
    assert killed.said == ""
    assert windows_done(out) == 2
    alone = server.run(run.argv(out), fault="blocks: after a window:kill")
    assert "stopped behind block 2 of 4: going on from there" in alone.said
    assert windows_done(out) == 3
    refused, silent = server.run_ranks(run.argv(out, "--seed=7"), 2)
    assert (refused.code, silent.code, silent.said) == (6, 6, "")
    assert "E-RESUME-MISMATCH" in refused.said


def test_commands_of_one_process_are_refused_to_several(server: ForkServer, run: TinyRun) -> None:
    """Told once, before any work."""
    first, second = server.run_ranks(["inspect", str(run.model)], 2)
    assert (first.code, second.code) == (2, 2)
    assert "E-RANKS-COMMAND" in first.said
    assert second.said == ""


def test_eight_runs_on_one_output_have_one_winner(run: TinyRun, tmp_path: Path) -> None:
    """The others end with 6 and name the winner's process and host; what it had begun is all that is there."""
    out = tmp_path / "out" / "sparse.onnx"
    out.parent.mkdir()
    environment = {
        **os.environ,
        "BLOCKPRESS_FAULT": "blocks: before a window:pause",
        "BLOCKPRESS_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "compressor", *run.argv(out)]
    racing = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    try:
        (winner,) = last_running(racing)
        for other in racing:
            if other is not winner:
                said = other.communicate()[1]
                assert other.returncode == 6, said
                assert (
                    f"E-OUTPUT-LOCKED  sparse.onnx is being written by another run (pid {winner.pid}" in said
                )
                assert socket.gethostname() in said
    finally:
        for process in racing:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    assert not [path for path in out.parent.iterdir() if not path.name.startswith(".")]


def last_running(processes: Sequence[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    """Those that run when all but one have ended, or after two minutes."""
    until = time.monotonic() + 120
    while True:
        running = [process for process in processes if process.poll() is None]
        if len(running) <= 1 or time.monotonic() > until:
            return running
        time.sleep(0.05)


def test_finish_that_memory_decided_stays_decided(server: ForkServer, tmp_path: Path) -> None:
    """Where less memory is free after a stop, the same command is still the same run."""
    run = tiny_run(tmp_path, finish__method="auto", finish__epochs=1)
    out = tmp_path / "out" / "sparse.onnx"
    out.parent.mkdir()
    assert server.run(run.argv(out), fault="blocks: after a window:kill").code == KILLED
    commit = max(state_of(out).glob("*.json"))
    body = json.loads(commit.read_text(encoding="utf-8"))
    assert body["facts"]["finish.method"] == "kl"
    facts = {**body["facts"], "finish.method": "none"}
    StateFolder(state_of(out)).commit(facts, body["content"], [StoredFile(*row) for row in body["files"]])
    again = server.run(run.argv(out), fault="blocks: after a window:kill")
    assert again.code == KILLED, again.said
    assert "going on from there" in again.said
