"""Attention as one operator of the library against the same in ONNX Runtime's own operators.

Both sessions load the same model, of one `RotaryAttention` node and its function; one of them without the library, so
that ONNX Runtime puts the function's nodes in its place and fuses what it can. Each step feeds several caches in turn,
so that none stays in the processor's own. Sessions run in turns, without spinning threads; a row is the median over the
rounds, and the ratio the median of those within them.

    python bench/attention.py --rounds 31

Needs the package in `runtime/` installed.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from typing import Any

import click
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

import blockpress_runtime
from exporters.attention_function import ROTARY_ATTENTION, attention_function
from exporters.packed_function import DOMAIN

Floats = NDArray[np.float32]

# Query heads, key heads, width of a head, new tokens, past tokens.
SHAPES = (
    (16, 16, 64, 1, 128),
    (16, 16, 64, 1, 1024),
    (32, 4, 64, 1, 128),
    (32, 4, 64, 1, 1024),
    (32, 8, 128, 1, 4096),
    (16, 16, 64, 8, 512),
    (16, 16, 64, 128, 0),
    (32, 4, 64, 128, 0),
    (16, 16, 64, 1024, 0),
    (32, 4, 64, 1024, 0),
)
CACHES = 6  # fed in turn; 2 for prompts
INPUTS = ("q", "k", "v", "past_key", "past_value", "mask", "cos", "sin")


def model(heads: int, kv_heads: int, width: int) -> bytes:
    """A model of the one node, with its function."""
    outputs = ("y", "present_key", "present_value")
    attributes = {"num_heads": heads, "kv_heads": kv_heads, "scale": width**-0.5}
    node = helper.make_node(ROTARY_ATTENTION, INPUTS, outputs, domain=DOMAIN, **attributes)
    ports = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in of]
        for of in (INPUTS, outputs)
    ]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    made = helper.make_model(
        helper.make_graph([node], "attention", *ports), opset_imports=imports, ir_version=10
    )
    made.functions.append(
        attention_function(ROTARY_ATTENTION, rows=heads != kv_heads, widths=(), apart=(), opset=18)
    )
    return bytes(made.SerializeToString())


def session(content: bytes, threads: int, *, library: bool) -> Any:
    """A session, with or without the library."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library:
        blockpress_runtime.register(options)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def feeds(heads: int, kv_heads: int, width: int, tokens: int, past: int, seed: int) -> dict[str, Floats]:
    """Random inputs of one sequence, with a causal mask."""
    random = np.random.default_rng(seed)
    shapes = {
        "q": (1, tokens, heads * width),
        "k": (1, tokens, kv_heads * width),
        "v": (1, tokens, kv_heads * width),
        "past_key": (1, kv_heads, past, width),
        "past_value": (1, kv_heads, past, width),
        "cos": (1, 1, tokens, width),
        "sin": (1, 1, tokens, width),
    }
    given = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    hidden = np.arange(past + tokens)[None] > np.arange(past, past + tokens)[:, None]
    given["mask"] = np.where(hidden, np.finfo(np.float32).min, 0).astype(np.float32)[None, None]
    return given


@click.command()
@click.option("--rounds", default=31, show_default=True, help="A third of them for prompts.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
def main(rounds: int, threads: int) -> None:
    """Time the operator and its rival."""
    kernels = os.environ.get("BLOCKPRESS_RUNTIME_ISA", "best")
    click.echo(f"{platform.processor() or platform.machine()}, {threads} threads, kernels: {kernels}\n")
    click.echo(
        "| heads | key heads | width | new tokens | past | operator, ms | ONNX Runtime, ms | ratio | difference |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        *_, tokens, _ = shape
        many = tokens >= 100
        content = model(*shape[:3])
        sessions = [session(content, threads, library=library) for library in (True, False)]
        caches = [feeds(*shape, seed) for seed in range(2 if many else CACHES)]
        ours, theirs = (one.run(["y"], caches[0])[0] for one in sessions)
        seconds: list[list[float]] = [[], []]
        for _ in range(max(3, rounds // 3) if many else rounds):
            for one, taken in zip(sessions, seconds, strict=True):
                begun = time.perf_counter()
                for given in caches:
                    one.run(None, given)
                taken.append((time.perf_counter() - begun) / len(caches))
        ratio = statistics.median(rival / own for own, rival in zip(*seconds, strict=True))
        times = " | ".join(f"{statistics.median(taken) * 1e3:.2f}" for taken in seconds)
        sizes = " | ".join(map(str, shape))
        click.echo(f"| {sizes} | {times} | {ratio:.2f} | {np.abs(ours - theirs).max():.1e} |")


if __name__ == "__main__":
    main()
