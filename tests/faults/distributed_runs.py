"""Runs of several processes: every kind of pass by 1, 2 and 4, and runs that lose a process.

    python tests/faults/distributed_runs.py

Passes must agree as docs/distributed.md promises. Of four processes each one is killed in turn, or stops answering: the
others must end in time, and the run must go on from what rank 0 has kept with another number of processes, to an output
like that of one. At last torchrun restarts processes that are killed again and again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import tiny_models  # noqa: E402  # its folder has to be known first
from faults.interrupted_runs import KILLED, ForkServer, TinyRun, fork_server, state_of, tiny_run  # noqa: E402
from faults.local_ranks import free_port  # noqa: E402
from faults.rank_agreement import agreement, run_passes  # noqa: E402
from faults.rank_passes import VARIANTS, WITH_DROPOUT  # noqa: E402

WORLDS = (2, 4)
IN_TIME_S = 120  # to notice a loss and end, on a machine that does something else too
SILENT_S = 20  # after which a process that does not answer is taken for lost


def check_passes(folder: Path, faults: list[str]) -> None:
    """All variants, against the pass of one process."""
    tiny_models.save_variant(folder / "model", "llama", num_hidden_layers=4)
    run_passes(folder, (1, *WORLDS), list(VARIANTS))
    for name in VARIANTS:
        for world in WORLDS:
            found = agreement(folder, name, world)
            click.echo(
                f"{name} by {world}: same on ranks {found.on_ranks}, masks {min(found.masks):.5f}, "
                f"perplexity {found.perplexity:.1e}"
            )
            near = found.masks[0] == 1 and min(found.masks) >= 0.999
            near = near and (found.perplexity <= 0.002 or name in WITH_DROPOUT)
            if not (found.on_ranks and near):
                faults.append(f"{name} by {world} processes: {found}")


def check_losses(server: ForkServer, run: TinyRun, folder: Path, faults: list[str]) -> None:
    """Each of four processes killed, or silent, after two windows; then two processes, then one go on."""
    whole = folder / "whole" / "sparse.onnx"
    whole.parent.mkdir()
    if server.run(run.argv(whole)).code != 0:
        faults.append("the run of one process failed")
    for number, (rank, action) in enumerate([(0, "kill"), (1, "kill"), (3, "kill"), (2, "pause")]):
        out = folder / f"lost-{number}" / "sparse.onnx"
        out.parent.mkdir()
        fault = {rank: f"blocks: before a window#3:{action}"}
        ended = server.run_ranks(run.argv(out), 4, faults=fault, patience_s=SILENT_S)
        codes = [one.code for one in ended]
        others = [one for place, one in enumerate(ended) if place != rank]
        click.echo(f"rank {rank}, {action}: exit codes {codes} after {ended[0].seconds:.0f} s")
        if codes[rank] != KILLED or any(one.code != 5 for one in others):
            faults.append(f"rank {rank}, {action}: exit codes {codes}")
        if not any("E-RANK-LOST" in one.said for one in others) or ended[0].seconds > IN_TIME_S:
            faults.append(f"rank {rank}, {action}: {ended[0].seconds:.0f} s, {others[0].said[-300:]}")
        fewer = server.run_ranks(run.argv(out), 2, faults={0: "blocks: before a window#2:kill"})
        if "stopped behind block 2 of 4: going on from there" not in fewer[0].said:
            faults.append(f"rank {rank}, {action}: two processes did not go on: {fewer[0].said[-300:]}")
        last = server.run(run.argv(out))
        if last.code != 0 or abs(_perplexity(out) / _perplexity(whole) - 1) > 0.002:
            faults.append(f"rank {rank}, {action}: exit {last.code}: {last.said[-300:]}")
        if state_of(out).exists():
            faults.append(f"rank {rank}, {action}: a state is left")


def check_restarts(run: TinyRun, folder: Path, faults: list[str]) -> None:
    """Processes that torchrun starts anew until there is nothing left to do; each time they get two windows further."""
    out = folder / "restarted" / "sparse.onnx"
    out.parent.mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT.parent),
        "BLOCKPRESS_FAULT": "blocks: before a window#3:kill",
        "BLOCKPRESS_CACHE": str(folder / "cache"),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=5"]
    for more in (["--standalone"], [f"--master-port={free_port()}"]):
        command = [*launcher, *more, "-m", "compressor", *run.argv(out), "--force", "--resume=auto"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        click.echo(f"torchrun {more[0]}: exit {ended.returncode}")
        if ended.returncode != 0 or not out.is_file():
            faults.append(f"torchrun {more[0]}: exit {ended.returncode}: {ended.stderr[-500:]}")


def _perplexity(out: Path) -> float:
    report = json.loads(out.with_suffix(".report.json").read_text(encoding="utf-8"))
    return float(report["perplexity"]["recovered"])


@click.command(help=__doc__)
def main() -> None:
    started, faults = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("passes", "server", "input"):
            (folder / name).mkdir()
        check_passes(folder / "passes", faults)
        run = tiny_run(folder / "input")
        with fork_server(folder / "server") as server:
            check_losses(server, run, folder, faults)
        check_restarts(run, folder, faults)
    click.echo(f"{len(faults)} faults, {(time.perf_counter() - started) / 60:.0f} min")
    for fault in faults:
        click.echo(fault, err=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
