"""What it costs to be able to go on: seconds of a run's commits, against the seconds of its pass over the blocks.

The commits of one run are timed as they happen (files written, hashed and flushed, older ones removed), several runs
after each other; the rest of the same run is the rival. The model is random, so that its size can be chosen.

    python bench/checkpoints.py --hidden 512 --layers 4 --repeats 3
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))

from random_model import model_config, write_model

from compressor import compress, read_recipe
from compressor.pass_state import PassState

TIMED = ("commit", "store_finished")


@contextmanager
def timed_commits() -> Iterator[list[float]]:
    """Seconds of every commit while the context lasts."""
    seconds: list[float] = []
    originals = {name: getattr(PassState, name) for name in TIMED}

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args)
            finally:
                seconds.append(time.perf_counter() - started)

        return call

    for name, original in originals.items():
        setattr(PassState, name, timed(original))
    try:
        yield seconds
    finally:
        for name, original in originals.items():
            setattr(PassState, name, original)


@click.command(help=__doc__)
@click.option("--hidden", default=512)
@click.option("--layers", default=4)
@click.option("--windows", default=32, help="Calibration windows of 256 tokens.")
@click.option("--repeats", default=3)
def main(hidden: int, layers: int, windows: int, repeats: int) -> None:
    settings = {
        "calibration.num_samples": windows,
        "calibration.seqlen": 256,
        "evaluation.max_windows": 16,
        "pruning.sparsity": 0.5,
        "pruning.method": "wanda",
        "recovery.lr": 1e-3,
        "finish.method": "none",
    }
    recipe, shares = read_recipe(None, settings), []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        write_model(model, model_config(layers, hidden, "float32"))
        for _ in range(repeats):
            with timed_commits() as seconds:
                result = compress(model, Path(scratch) / "sparse.onnx", recipe, validate=False, force=True)
            blocks_s, state_s = result.report["timings"]["blocks"], sum(seconds)
            shares.append(state_s / (blocks_s - state_s))
            click.echo(f"commits {state_s:.2f} s of {blocks_s:.1f} s: {100 * shares[-1]:.2f} % of the rest")
    click.echo(f"hidden {hidden}, {layers} blocks: median {100 * statistics.median(shares):.2f} %")


if __name__ == "__main__":
    main()
