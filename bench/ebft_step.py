"""What EBFT adds to a bare PyTorch loop over the same block: masks, held-out selection and bookkeeping.

Both sides train one Llama decoder layer on the same windows with fused AdamW, in turns (A B A B ...), so that a
machine that slows down slows both. The bare loop is forward, backward and step on batches that are already on
the device. EBFT is the whole repair with the default recipe: held-out loss before, after each of 10 epochs, the best
weights copied, gradients masked and clipped, every batch read from host memory, masks verified at the end.

    python bench/ebft_step.py --hidden 512 --tokens 2048
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from compressor.pruning.magnitude import magnitude_mask
from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO
from compressor.recovery.ebft import repair, trained_weights
from compressor.recovery.frozen_masks import FrozenMasks
from compressor.recovery.precision import autocast
from compressor.sparsity import Mask, SparsityPattern
from compressor.streams import Activations, in_order

EPOCHS = 10
BATCH = 8
HELDOUT_SHARE = 0.125


class Layers(nn.Module):
    """Decoder layers of Llama with the position tables that they need, (B, T, D) -> (B, T, D)."""

    def __init__(self, hidden: int, layers: int, seqlen: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            attn_implementation="sdpa",
        )
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(layers))
        tables = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(seqlen)[None])
        self.register_buffer("cos", tables[0], persistent=False)
        self.register_buffer("sin", tables[1], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        """The layers one after the other."""
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=(self.cos, self.sin))
        return hidden


@dataclass(frozen=True)
class Setting:
    """A dense block, the masks of its pruned copy, its windows, and what measures time."""

    block: Layers
    masks: dict[str, Mask]
    io: BlockIO
    steps: int
    clock: Callable[[], float]


def make_setting(
    hidden: int, layers: int, tokens: int, steps: int, device: torch.device, clock: Callable[[], float]
) -> Setting:
    """Half the weights of every linear pruned; enough windows for ``steps`` steps in all epochs together."""
    torch.manual_seed(0)
    seqlen, windows = tokens // BATCH, max(1, steps // EPOCHS) * BATCH
    heldout = max(1, round(windows * HELDOUT_SHARE / (1 - HELDOUT_SHARE)))
    block = Layers(hidden, layers, seqlen).to(device)
    inputs = torch.randn(windows + heldout, seqlen, hidden)
    with torch.no_grad():
        targets = torch.cat([block(part.to(device)).cpu() for part in inputs.split(BATCH)])
    pattern = SparsityPattern.unstructured(0.5)
    masks = {name: magnitude_mask(w, pattern) for name, w in block.named_parameters() if w.dim() == 2}
    parts = inputs[:windows], targets[:windows], inputs[windows:], targets[windows:]
    stores = [Activations.filled(part, device=device) for part in parts]
    amp = torch.bfloat16 if device.type == "cuda" else None
    io = BlockIO(*stores, forward=lambda module, hidden: module(hidden), device=device, amp_dtype=amp)
    return Setting(block, masks, io, windows // BATCH * EPOCHS, clock)


def bare_loop_s(setting: Setting) -> float:
    """Seconds for all steps of forward, backward and AdamW, and nothing else."""
    block = copy.deepcopy(setting.block)
    FrozenMasks(
        block, setting.masks
    ).zero_weights()  # starts where EBFT starts, so that both have errors to mend
    weights = trained_weights(block)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    stores = setting.io.inputs, setting.io.targets
    batches = [tuple(store.read(rows) for store in stores) for rows in in_order(len(stores[0]), BATCH)]

    def loop() -> None:
        for step in range(setting.steps):
            hidden, target = batches[step % len(batches)]
            with autocast(setting.io):
                output = block(hidden)
            torch.nn.functional.mse_loss(output.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return _seconds(loop, setting)


def ebft_s(setting: Setting) -> float:
    """Seconds for the whole repair with the default recipe at a given learning rate."""
    block = copy.deepcopy(setting.block)
    recipe = RecoveryRecipe(epochs=EPOCHS, batch_size=BATCH)
    return _seconds(lambda: repair(block, setting.masks, setting.io, recipe, lr=1e-4, seed=0), setting)


def _seconds(work: Callable[[], object], setting: Setting) -> float:
    _wait(setting.io.device)
    started = setting.clock()
    work()
    _wait(setting.io.device)
    return setting.clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The card's name, or the processor with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@click.command(context_settings={"show_default": True})
@click.option("--hidden", default=512, type=click.IntRange(min=64), help="Hidden width, a multiple of 64.")
@click.option("--tokens", default=2048, type=click.IntRange(min=BATCH), help="Tokens per step.")
@click.option("--layers", default=1, type=click.IntRange(min=1), help="Decoder layers in the block.")
@click.option("--steps", default=40, type=click.IntRange(min=EPOCHS), help="Steps per run, over 10 epochs.")
@click.option("--repeats", default=5, type=click.IntRange(min=1), help="Runs of each side, in turns.")
@click.option("--device", default="cpu", help="cpu or cuda[:i]; on CUDA both sides compute in bfloat16.")
@click.option(
    "--clock",
    default="wall",
    type=click.Choice(["wall", "processor"]),
    help="processor: seconds of processor time, for a machine whose cores others use too.",
)
def main(hidden: int, tokens: int, layers: int, steps: int, repeats: int, device: str, clock: str) -> None:
    """Time a repair against a bare training loop of as many steps and print one line of a Markdown table."""
    read_clock = time.perf_counter if clock == "wall" else time.process_time
    setting = make_setting(hidden, layers, tokens, steps, torch.device(device), read_clock)
    bare_loop_s(setting), ebft_s(setting)  # both sides warm
    pairs = []
    for repeat in range(repeats):
        pairs.append((bare_loop_s(setting), ebft_s(setting)))
        click.echo(f"{repeat + 1}/{repeats}: bare {pairs[-1][0]:.2f} s, EBFT {pairs[-1][1]:.2f} s", err=True)
    bare, tuned = (1000 * statistics.median(times) / setting.steps for times in zip(*pairs, strict=True))
    ratio = statistics.median(tuned_s / bare_s for bare_s, tuned_s in pairs)
    click.echo(
        "| device | hidden | layers | tokens/step | steps | clock | bare ms/step | EBFT ms/step | ratio |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|")
    click.echo(
        f"| {device_name(setting.io.device)} | {hidden} | {layers} | {tokens} | {setting.steps} "
        f"| {clock} | {bare:.1f} | {tuned:.1f} | {ratio:.3f} |"
    )


if __name__ == "__main__":
    main()
