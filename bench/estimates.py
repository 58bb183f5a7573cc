"""What `--dry-run` says of a run, against what the run takes: peak memory, bytes of the output, seconds of the blocks.

Each model goes through `compress run --dry-run --json` and then through the run itself, both in processes of their own
on the CPU. What is shown is estimated / real. "bytes" are the ONNX files and the PyTorch model; "blocks" are the pass
over them with trials of learning rates and, where it runs, the tuning of all of them, without export and validation.
Without MODEL a random Llama of --layers blocks and --hidden is written.

    python bench/estimates.py examples/tiny-llm --set calibration.num_samples=64
    python bench/estimates.py --layers 4 --hidden 1024 --set finish.method=none --set recovery.epochs=2
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))

from random_model import ROOT, model_config, write_model

MIB = 2**20


def run_command(model: Path, out: Path, settings: tuple[str, ...], *more: str) -> dict[str, Any]:
    """The JSON that the command prints."""
    command = [
        sys.executable,
        "-m",
        "compressor",
        "run",
        str(model),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--json",
    ]
    command += ["--no-validate", *more, *(part for setting in settings for part in ("--set", setting))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"exit {done.returncode}: {done.stderr}")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@click.command(help=__doc__)
@click.argument("model", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--layers", default=4)
@click.option("--hidden", default=1024)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As for `compress run`.")
def main(model: Path | None, layers: int, hidden: int, settings: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            model = Path(scratch) / f"llama-{layers}x{hidden}"
            model.mkdir()
            write_model(model, model_config(layers, hidden, "float32"))
        out = Path(scratch) / "out" / "sparse.onnx"
        out.parent.mkdir()
        said = run_command(model.resolve(), out, settings, "--dry-run")["estimate"]
        report = run_command(model.resolve(), out, settings)
        made = sum(
            path.stat().st_size
            for path in out.parent.rglob("*")
            if path.suffix in (".onnx", ".data", ".safetensors")
        )
        pairs = {
            "memory, MiB": (said["host_bytes"] / MIB, report["peak_memory_bytes"]["host"] / MIB),
            "bytes, MiB": (said["output_bytes"] / MIB, made / MIB),
            "blocks, s": (said["blocks_s"], report["timings"]["blocks"]),
        }
        click.echo(
            f"{model.name}: "
            + " · ".join(
                f"{name} {estimated:.0f} / {real:.0f} = {estimated / real:.2f}"
                for name, (estimated, real) in pairs.items()
            )
        )


if __name__ == "__main__":
    main()
