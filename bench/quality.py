"""Perplexity of dense, pruned, repaired and exported model for pruners, recoveries and patterns: a table in Markdown.

Each cell is one `compress run` with the default recipe, validation included, in a process of its own; the whole
command line can be read off a row. `--threads 1 --jobs 2` uses two cores best on models this small.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

HEAD = (
    "| pruner | pattern | recovery | dense | pruned | recovered | ONNX | gap closed | ONNX drift "
    "| stored / dense bytes | zeros | exit |"
    "\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Cell:
    """One run: pruner, ``0.5`` or ``2:4``, recovery, what it printed, its exit code (0: validation passed)."""

    pruner: str
    pattern: str
    recovery: str
    report: dict[str, Any]
    exit_code: int

    def row(self) -> str:
        """The cell as a row of the table; the bytes are those of the pruned weights."""
        found = self.report["perplexity"]
        dense, pruned, recovered, onnx = (found[key] for key in ("dense", "pruned", "recovered", "onnx"))
        closed = (pruned - recovered) / (pruned - dense)
        weights = self.report["weights"]
        stored = sum(weight["stored_bytes"] for weight in weights) / sum(
            weight["dense_bytes"] for weight in weights
        )
        figures = (
            f"{dense:.3f}",
            f"{pruned:.3f}",
            f"{recovered:.3f}",
            f"{onnx:.3f}",
            f"{100 * closed:.1f} %",
        )
        drift = f"{abs(onnx / recovered - 1):.1e}"
        zeros = f"{100 * self.report['sparsity']['measured']:.2f} %"
        head = f"| {self.pruner} | {self.pattern} | {self.recovery} | {' | '.join(figures)} "
        return f"{head}| {drift} | {stored:.3f} | {zeros} | {self.exit_code} |"


def run_cell(
    model: str, pruner: str, pattern: str, recovery: str, extra: tuple[str, ...], threads: int
) -> Cell:
    """One compress run into a temporary folder.

    Raises:
        click.ClickException: The run did not end with a report.
    """
    target = "--pattern" if ":" in pattern else "--sparsity"
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        out = str(Path(folder) / "sparse.onnx")
        command = [sys.executable, "-m", "compressor", "run", model, "--out", out, "--json", "--quiet"]
        command += ["--pruner", pruner, target, pattern, "--recovery", recovery, *extra]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 4):
        raise click.ClickException(
            f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}"
        )
    return Cell(pruner, pattern, recovery, json.loads(done.stdout), done.returncode)


@click.command()
@click.argument("model")
@click.option("--pruners", default="magnitude,wanda,sparsegpt", show_default=True)
@click.option("--patterns", default="0.5,0.7,2:4", show_default=True)
@click.option("--recoveries", default="ebft", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Runs side by side.")
@click.option("--threads", default=1, show_default=True, help="Threads of each run.")
@click.option("--calibration", help="Handed on to compress run.")
@click.option("--eval-data", help="Handed on to compress run.")
@click.option("--set", "settings", multiple=True, help="Handed on to compress run.")
def main(
    model: str,
    pruners: str,
    patterns: str,
    recoveries: str,
    jobs: int,
    threads: int,
    calibration: str | None,
    eval_data: str | None,
    settings: tuple[str, ...],
) -> None:
    """Measure MODEL with every pruner at every pattern, repaired by every recovery."""
    extra: list[str] = []
    for option, value in (("--calibration", calibration), ("--eval-data", eval_data)):
        extra += [option, value] if value is not None else []
    for setting in settings:
        extra += ["--set", setting]
    lists = (patterns.split(","), pruners.split(","), recoveries.split(","))
    grid = [(pruner, pattern, recovery) for pattern, pruner, recovery in itertools.product(*lists)]
    click.echo(HEAD)
    with ThreadPoolExecutor(jobs) as pool:
        for cell in pool.map(lambda at: run_cell(model, *at, tuple(extra), threads), grid):
            click.echo(cell.row())


if __name__ == "__main__":
    main()
