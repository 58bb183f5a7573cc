"""Peak memory of `compress run` over models of different depth: it should not grow with the number of blocks.

Random Llamas (or Mixtrals) in safetensors shards, one block per shard, go through the whole command in a process of
their own. Resident memory is sampled of the command and of the child in which it validates, each for itself: all of it,
and the part that is not a file's pages (which the system takes back when it needs them). Evaluation and calibration
windows are the same for all depths; the end-to-end finish, which holds the whole model, is off.

    python bench/memory.py --layers 8,16,32 --hidden 1024
    python bench/memory.py --layers 32 --hidden 2048 --validate
    python bench/memory.py --layers 4,8,16 --hidden 512 --experts 8
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from random_model import ROOT, model_config, write_model

SAMPLE_S = 0.05
MIB = 2**20


@dataclass
class Peak:
    """The most that was sampled of one process, in bytes."""

    resident: int = 0
    anonymous: int = 0


@dataclass(frozen=True)
class Row:
    """One model's way through the command."""

    layers: int
    model_bytes: int
    onnx_bytes: int
    run: Peak
    child: Peak
    seconds: float
    passed: bool | None


def run_command(model: Path, out: Path, validate: bool) -> tuple[Peak, Peak, float]:
    """Run the command; peaks of its own process and of the child that validates, and the seconds it took."""
    settings = [
        "--calibration", "python-docs", "--seqlen", "128", "--num-calibration-samples", "16", "--pruner", "wanda",
        "--finish", "none", "--set", "recovery.epochs=1", "--set", "recovery.lr=0.0001", "--max-eval-windows", "4",
        "--max-ppl-increase", "1000000%",
    ]  # fmt: skip
    command = [sys.executable, "-m", "compressor", "run", str(model), "--out", str(out), *settings]
    command += [] if validate else ["--no-validate"]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    run, child = Peak(), Peak()
    while process.poll() is None:
        sample(process.pid, run)
        for other in children(process.pid):
            sample(other, child)
        time.sleep(SAMPLE_S)
    if process.returncode not in (0, 4):
        raise click.ClickException(
            f"exit {process.returncode}: {process.stderr.read() if process.stderr else ''}"
        )
    return run, child, time.perf_counter() - started


def children(pid: int) -> Iterator[int]:
    """Processes that ``pid`` has started."""
    try:
        yield from (child.pid for child in psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return


def sample(pid: int, peak: Peak) -> None:
    """Raise the peak to what the process takes now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    taken = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Rss", "VmHWM"))
    }
    peak.resident = max(peak.resident, taken.get("VmHWM", 0))
    peak.anonymous = max(peak.anonymous, taken.get("RssAnon", 0))


@click.command(help=__doc__)
@click.option("--layers", default="8,16,32")
@click.option("--hidden", default=1024)
@click.option("--experts", default=0, help="Experts of a block.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option(
    "--validate/--no-validate", default=False, help="Validate too; the child's peaks are then shown."
)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=None, help="Where models and outputs lie meanwhile."
)
def main(layers: str, hidden: int, experts: int, dtype: str, validate: bool, folder: Path | None) -> None:
    rows = []
    for depth in (int(one) for one in layers.split(",")):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            model, out = Path(scratch) / "model", Path(scratch) / "out" / "sparse.onnx"
            model.mkdir()
            out.parent.mkdir()
            model_bytes = write_model(model, model_config(depth, hidden, dtype, experts=experts))
            run, child, seconds = run_command(model, out, validate)
            report = json.loads(out.with_suffix(".report.json").read_text(encoding="utf-8"))
            verdict = report["validation"] and report["validation"]["passed"]
            rows.append(Row(depth, model_bytes, report["size"]["onnx_bytes"], run, child, seconds, verdict))
            show(rows[-1])
    first = rows[0].run
    for row in rows[1:]:
        resident, anonymous = row.run.resident / first.resident, row.run.anonymous / first.anonymous
        click.echo(
            f"{row.layers} against {rows[0].layers} blocks: resident {resident:.2f}, anonymous {anonymous:.2f}"
        )


def show(row: Row) -> None:
    """One line of the table, sizes in MiB."""
    sizes = [row.model_bytes, row.onnx_bytes, row.run.resident, row.run.anonymous, row.child.resident]
    sizes.append(row.child.anonymous)
    cells = [str(row.layers), *(f"{size / MIB:.0f}" for size in sizes), f"{row.seconds:.0f}", str(row.passed)]
    click.echo("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
