"""Peak memory of `compress run` over models of different depth: it should not grow with the number of blocks.

Random Llamas in safetensors shards, one block per shard, go through the whole command in a process of their own.
Resident memory is sampled of the command and of the child in which it validates, each for itself: all of it, and the
part that is not a file's pages (which the system takes back when it needs them). Evaluation and calibration windows are
the same for all depths; the end-to-end finish, which holds the whole model, is off.

    python bench/memory.py --layers 8,16,32 --hidden 1024
    python bench/memory.py --layers 32 --hidden 2048 --validate
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER_FROM = ROOT / "examples" / "tiny-llm"
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


def llama_config(layers: int, hidden: int, dtype: str) -> LlamaConfig:
    """A Llama with an untied head and the example's vocabulary."""
    vocabulary = json.loads((TOKENIZER_FROM / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )


def write_model(folder: Path, config: LlamaConfig) -> int:
    """Write a random model shard by shard; the bytes of its weights."""
    dtype, generator = (
        getattr(torch, str(config.dtype).removeprefix("torch.")),
        torch.Generator().manual_seed(0),
    )
    weight_map: dict[str, str] = {}
    size = 0

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    def shard(number: int, tensors: dict[str, Tensor]) -> None:
        nonlocal size
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    h, m, ones = config.hidden_size, config.intermediate_size, torch.ones(config.hidden_size, dtype=dtype)
    shapes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (h, h), "self_attn.v_proj": (h, h)}
    shapes |= {
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (m, h),
        "mlp.up_proj": (m, h),
        "mlp.down_proj": (h, m),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"{prefix}{name}.weight": ones for name in ("input_layernorm", "post_attention_layernorm")
        }
        shard(layer + 1, {name: tensor.clone() for name, tensor in tensors.items()})
    vocabulary = config.vocab_size
    rest = {"model.embed_tokens.weight": matrix(vocabulary, h), "lm_head.weight": matrix(vocabulary, h)}
    shard(0, {**rest, "model.norm.weight": ones.clone()})
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER_FROM / name, folder / name)
    return size


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
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option(
    "--validate/--no-validate", default=False, help="Validate too; the child's peaks are then shown."
)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=None, help="Where models and outputs lie meanwhile."
)
def main(layers: str, hidden: int, dtype: str, validate: bool, folder: Path | None) -> None:
    rows = []
    for depth in (int(one) for one in layers.split(",")):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            model, out = Path(scratch) / "model", Path(scratch) / "out" / "sparse.onnx"
            model.mkdir()
            out.parent.mkdir()
            model_bytes = write_model(model, llama_config(depth, hidden, dtype))
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
