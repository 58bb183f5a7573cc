"""Kill runs at every named point and at random moments, fill their disk at every write, start them again, and count
what was not as it should be.

    python tests/faults/kill_runs.py --moments 200 --chain 10 --writes

Every chain is one output: its run is killed up to ``--chain`` times, each time at a random moment of the time that a
whole run takes, and then started until it ends. What lies there then must be what a run leaves that nothing
interrupted, to the byte, and nothing else; and between two kills no committed window may be lost.

The disk is full for a run from its N-th write on, N = 1, 2, ..., all on one output: each run goes on from what the one
before has committed, N begins anew behind each commit, and so every write of a whole run fails once. Each time the run
must end with 5 and E-DISK-FULL and leave nothing but its state; the last one leaves what an uninterrupted run leaves.
``full_disk.c`` is what lets writes fail; it takes Linux and a C compiler.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from faults.full_disk import full_from  # noqa: E402  # its folder has to be known first
from faults.interrupted_runs import (  # noqa: E402
    KILLED,
    Ended,
    ForkServer,
    TinyRun,
    contents,
    fork_server,
    report_facts,
    state_of,
    tiny_run,
)

from compressor.run.faults import POINTS  # noqa: E402


class Harness:
    """One tiny model, the output of a whole run, and the faults found so far."""

    def __init__(self, server: ForkServer, run: TinyRun, folder: Path) -> None:
        self.server, self.run, self.folder = server, run, folder
        self.kills = self.completed = 0
        self.faults: list[str] = []
        self.whole = self.place("whole")
        self.full = self.start(self.whole)

    def place(self, name: str) -> Path:
        """An output in a folder of its own."""
        (self.folder / name).mkdir()
        return self.folder / name / "sparse.onnx"

    def start(self, out: Path, *, fault: str | None = None, kill_after_s: float | None = None) -> Ended:
        """One run; a kill is counted, any other end than the right one noted."""
        ended = self.server.run(self.run.argv(out), fault=fault, kill_after_s=kill_after_s)
        self.kills += ended.code == KILLED
        if ended.code not in (0, KILLED):
            self.note(f"{out.parent.name}: exit {ended.code}: {ended.said[-500:]}")
        return ended

    def note(self, fault: str) -> None:
        """Count a fault, and tell it at once: the whole takes long."""
        self.faults.append(fault)
        click.echo(fault, err=True)

    def finish(self, out: Path) -> None:
        """Start the run a last time, and compare what lies there with the whole run's output."""
        if self.start(out).code == 0:
            self.check(out)
        else:
            self.note(f"{out.parent.name}: did not end")

    def check(self, out: Path) -> None:
        """Compare the output of a run that has ended with the whole run's, and remove it."""
        name = out.parent.name
        self.completed += 1
        if contents(out) != contents(self.whole):
            self.note(f"{name}: other bytes")
        if report_facts(out) != report_facts(self.whole):
            self.note(f"{name}: another report")
        left = {path.name for path in out.parent.iterdir()} ^ {
            path.name for path in self.whole.parent.iterdir()
        }
        if left:
            self.note(f"{name}: {sorted(left)} lie there")
        shutil.rmtree(out.parent)

    def windows(self, out: Path) -> int:
        """Windows that are committed, 0 without a state."""
        commits = sorted(state_of(out).glob("*.json"))
        return json.loads(commits[-1].read_text(encoding="utf-8"))["content"]["windows"] if commits else 0


def kill_at_points(harness: Harness) -> None:
    """Each point once, where it comes by for the first time, and the ones of the blocks for the third time too."""
    for number, point in enumerate(POINTS):
        for times in (1, 3) if point.startswith(("blocks", "state")) else (1,):
            out = harness.place(f"point-{number}-{times}")
            if harness.start(out, fault=f"{point}#{times}:kill").code != KILLED:
                harness.note(f"{point}: not reached")
            harness.finish(out)
            click.echo(f"{point}#{times}: {len(harness.faults)} faults")


def kill_at_moments(harness: Harness, moments: int, chain: int, seed: int) -> None:
    """Random moments, in chains on one output each."""
    rng, number = random.Random(seed), 0
    while moments > 0:
        number += 1
        out, before = harness.place(f"chain-{number}"), 0
        for _ in range(min(chain, moments)):
            moments -= 1
            ended = harness.start(out, kill_after_s=rng.uniform(0, harness.full.seconds))
            if ended.code == 0:
                break
            done = harness.windows(out)
            if done < before:
                harness.note(f"{out.parent.name}: {before} windows were committed, {done} are left")
            before = done
        harness.finish(out)
        click.echo(f"chain {number}: {harness.kills} kills, {len(harness.faults)} faults")


def fill_disk_at_writes(harness: Harness) -> int:
    """The disk full from each write on; how many runs ended by it."""
    out, done, number, failed = harness.place("writes"), 0, 1, 0

    def start() -> Ended:
        return harness.server.run(harness.run.argv(out), environment=full_from(number, out.parent))

    while (ended := start()).code != 0:
        failed += 1
        if ended.code != 5 or "E-DISK-FULL" not in ended.said:
            harness.note(f"write {number} behind window {done}: exit {ended.code}: {ended.said[-500:]}")
        left = {path.name for path in out.parent.iterdir()} - {state_of(out).name}
        if left:
            harness.note(f"write {number} behind window {done}: {sorted(left)} lie there")
        click.echo(f"write {number} behind window {done}: {len(harness.faults)} faults")
        before, done = done, harness.windows(out)
        if done < before:
            harness.note(f"write {number}: {before} windows were committed, {done} are left")
        number = number + 1 if done == before else 1
    harness.check(out)
    return failed


@click.command(help=__doc__)
@click.option("--moments", default=200, help="Random moments.")
@click.option("--chain", default=10, help="Kills of one output at most.")
@click.option("--seed", default=0)
@click.option("--points/--no-points", default=True, help="The named points too.")
@click.option("--writes/--no-writes", default=False, help="A full disk at every write.")
def main(moments: int, chain: int, seed: int, points: bool, writes: bool) -> None:
    started, full_disks = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "server").mkdir()
        (folder / "input").mkdir()
        with fork_server(folder / "server") as server:
            harness = Harness(server, tiny_run(folder / "input", validate=True), folder)
            click.echo(f"a whole run takes {harness.full.seconds:.1f} s")
            if points:
                kill_at_points(harness)
            kill_at_moments(harness, moments, chain, seed)
            if writes and server.fills_disks:
                full_disks = fill_disk_at_writes(harness)
            elif writes:
                click.echo("no C compiler, or not Linux: no disk is filled")
    minutes = (time.perf_counter() - started) / 60
    totals = f"{harness.kills} kills, {full_disks} full disks, {harness.completed} runs completed"
    totals += f", {len(harness.faults)} faults"
    click.echo(f"{totals}, {minutes:.0f} min")
    sys.exit(bool(harness.faults))


if __name__ == "__main__":
    main()
