"""Export by blocks against a whole-model torch.onnx.export of the same model: time and extra peak memory.

Each export runs in a fresh process that has built the same random Llama; time and memory count from there,
imports of the exporter and the writing of the file included. The two take turns (A B A B ...), so that a
machine that slows down slows both. Both files are run in ONNX Runtime and compared with PyTorch afterwards;
that, and the block check that the product runs after its export, are not part of the time.

    python bench/export.py --layers 32 --hidden 512 --repeats 3
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from exporters.parts import LoadedParts

OPSET = 18
BATCH, PAST, LENGTH = 2, 7, 5
METHODS = ("block-wise", "whole model")


@dataclass(frozen=True)
class Measured:
    """One export: wall and processor seconds, extra peak memory, and how far its logits are from PyTorch's."""

    wall_s: float
    cpu_s: float
    extra_peak_mib: float
    max_abs_error: float
    block_check_s: float | None


def build_model(layers: int, hidden: int) -> LlamaForCausalLM:
    """Return a random Llama in float32 with grouped-query attention and an untied head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class WholeModel(nn.Module):
    """The model as a function of its cache's tensors, which is what the exporter wants."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache(ddp_cache_data=past)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, *(states for layer in cache.layers for states in (layer.keys, layer.values))


def example(model: LlamaForCausalLM) -> dict[str, Any]:
    """Return token inputs, left-padded in one row, and a random past."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(BATCH, PAST + LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    config = model.config
    shape = (BATCH, config.num_key_value_heads, PAST, config.head_dim)
    return {
        "input_ids": torch.randint(config.vocab_size, (BATCH, LENGTH), generator=generator),
        "attention_mask": mask,
        # A copy, since the exporter fixes the strides of a slice.
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, PAST:].clone(),
        "past": [
            (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
            for _ in range(config.num_hidden_layers)
        ],
    }


def export_whole(model: LlamaForCausalLM, path: Path) -> Callable[[], float | None]:
    """Write the model with one torch.onnx.export."""
    inputs = example(model)
    batch, length, past = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    tokens = {0: batch, 1: length}
    axes = {
        "input_ids": tokens,
        "attention_mask": {0: batch, 1: torch.export.Dim.DYNAMIC},
        "position_ids": tokens,
        "past": [({0: batch, 2: past}, {0: batch, 2: past}) for _ in inputs["past"]],
    }
    names = [f"{i}.{part}" for i in range(len(inputs["past"])) for part in ("key", "value")]
    torch.onnx.export(
        WholeModel(model),
        (),
        str(path),
        kwargs=inputs,
        dynamic_shapes=axes,
        input_names=[*list(inputs)[:3], *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        opset_version=OPSET,
        dynamo=True,
        external_data=True,
        verbose=False,
    )
    return lambda: None


def export_by_blocks(model: LlamaForCausalLM, path: Path) -> Callable[[], float | None]:
    """Write the model as the product does, all weights dense; return what times the block check."""
    from exporters.block_check import check_blocks
    from exporters.causal_lm import build_graph
    from exporters.wire import write_model

    parts = LoadedParts(model)
    graph = build_graph(parts, opset=OPSET)
    write_model(graph.proto, graph.weights, path, f"{path.name}.data", encoding="dense")
    return lambda: check_blocks(parts, graph).elapsed_s


def largest_error(model: LlamaForCausalLM, path: Path) -> float:
    """Return the largest absolute difference of the file's logits in ONNX Runtime from PyTorch's."""
    import onnxruntime

    inputs = example(model)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask", "position_ids")}
    for index, pair in enumerate(inputs["past"]):
        for part, states in zip(("key", "value"), pair, strict=True):
            feeds[f"past_key_values.{index}.{part}"] = states.numpy()
    (found,) = session.run(["logits"], feeds)
    with torch.no_grad():
        expected = WholeModel(model)(**inputs)[0].numpy()
    return float(np.abs(found - expected).max())


def peak_and_resident_bytes() -> tuple[int, int]:
    """Return the peak since `forget_peak` and the present size of this process's memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, resident = (int(lines[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS"))
    return peak, resident


def forget_peak() -> int:
    """Make the present memory the peak, and return it in bytes. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_and_resident_bytes()[1]


def measure(method: str, layers: int, hidden: int, folder: Path) -> Measured:
    """Export in this process."""
    warnings.simplefilter("ignore")
    model = build_model(layers, hidden)
    export = export_by_blocks if method == METHODS[0] else export_whole
    before = forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    block_check = export(model, folder / "model.onnx")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = peak_and_resident_bytes()[0]
    error = largest_error(model, folder / "model.onnx")
    return Measured(wall, cpu, (peak - before) / 2**20, error, block_check())


def measure_apart(method: str, layers: int, hidden: int) -> Measured:
    """Export in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--layers", str(layers), "--hidden", str(hidden)]
        command += ["--only", method, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{method} failed:\n{done.stderr[-2000:]}")
        return Measured(**json.loads(done.stdout.splitlines()[-1]))


def print_table(rows: dict[str, list[Measured]], layers: int, hidden: int) -> None:
    """Print medians and their ratio."""
    blocks, whole = (rows[method] for method in METHODS)
    click.echo(f"{layers} layers, hidden {hidden}, opset {OPSET}, medians of {len(blocks)} in turns,")
    click.echo(f"{platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    click.echo("| | " + " | ".join(METHODS) + " | ratio |\n|---|---|---|---|")
    labels = {
        "wall_s": "wall time, s",
        "cpu_s": "processor time, s",
        "extra_peak_mib": "extra peak memory, MiB",
    }
    for key, label in labels.items():
        ours, theirs = (statistics.median(getattr(run, key) for run in runs) for runs in (blocks, whole))
        click.echo(f"| {label} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |")
    errors = [max(run.max_abs_error for run in runs) for runs in (blocks, whole)]
    click.echo(f"| max abs error of logits | {errors[0]:.1e} | {errors[1]:.1e} | |")
    check = statistics.median(run.block_check_s or 0.0 for run in blocks)
    click.echo(f"| block check afterwards, s | {check:.1f} | | |")


@click.command()
@click.option("--layers", default=32, show_default=True)
@click.option("--hidden", default=512, show_default=True, help="A multiple of 64.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each, in turns.")
@click.option("--only", type=click.Choice(METHODS), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(layers: int, hidden: int, repeats: int, only: str | None, folder: Path | None) -> None:
    """Compare the two exports and print a markdown table."""
    if only is not None and folder is not None:
        click.echo(json.dumps(asdict(measure(only, layers, hidden, folder))))
        return
    rows: dict[str, list[Measured]] = {method: [] for method in METHODS}
    for number in range(repeats):
        for method in METHODS:
            rows[method].append(measure_apart(method, layers, hidden))
            click.echo(f"{method}, run {number + 1}: {rows[method][-1]}", err=True)
    print_table(rows, layers, hidden)


if __name__ == "__main__":
    main()
