"""EBFT's repair of a large model's blocks against the published training loop, on one GPU, in one run.

Decoder layers of LLaMA-7B's shape with random weights, half of each matrix pruned by magnitude, are repaired as
`compress run` repairs a block (compressor.recovery.ebft: bfloat16 autocast, fused AdamW, batches that travel while
one is used, held-out loss after each epoch, best weights kept, masks verified), and by a plain transcription of the
published loop (arXiv 2402.12419): float16 autocast with a loss scale, a float32 mask that multiplies the weight in
every forward pass, clipping by norm 1, AdamW with a linear schedule, states of 8 windows fetched from pageable host
memory in each step, last weights kept. Both start from the same weights, in turns, block after block.

Time is the repair of one block times the number of blocks; statistics, propagation and the trials of learning rates
come on top. FLOPs are 6 per weight and token, and 6 D T per token of causal attention; the peak is the best of some
square bfloat16 matmuls on the same device.

    python bench/gpu_ebft.py
    python bench/gpu_ebft.py --compile
    python bench/gpu_ebft.py --small --device cpu
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import click
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from compressor.devices import mixed_precision
from compressor.pruning.magnitude import magnitude_mask
from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO
from compressor.recovery.ebft import repair
from compressor.sparsity import Mask, SparsityPattern
from compressor.streams import Activations, in_order, shuffled

HELDOUT_SHARE = 0.125
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The block, its text and its training."""

    hidden: int = 4096
    mlp: int = 11008
    heads: int = 32
    windows: int = 256
    seqlen: int = 1024
    epochs: int = 10
    batch: int = 8
    blocks: int = 32

    @property
    def weights(self) -> int:
        """Of a block's matrices."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.mlp

    @property
    def training_flops(self) -> float:
        """Forward and backward passes over all windows of one block, all epochs."""
        tokens = self.windows * self.seqlen * self.epochs
        return tokens * (6.0 * self.weights + 6.0 * self.hidden * self.seqlen)


SMALL = Shape(hidden=64, mlp=176, heads=2, windows=8, seqlen=16, epochs=2, batch=4, blocks=4)


class Layer(nn.Module):
    """A decoder layer with its position tables, (B, T, D) -> (B, T, D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.seqlen,
            attn_implementation="sdpa",
        )
        self.layer = LlamaDecoderLayer(config, 0)
        for weight in self.layer.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        tables = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(shape.seqlen)[None])
        self.register_buffer("cos", tables[0], persistent=False)
        self.register_buffer("sin", tables[1], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        """The layer at positions from 0."""
        output: Tensor = self.layer(hidden, position_embeddings=(self.cos, self.sin))
        return output


@dataclass(frozen=True)
class Subject:
    """One dense block, the masks of its pruned copy, and its windows in host memory."""

    dense: Layer
    masks: dict[str, Mask]
    io: BlockIO


@dataclass(frozen=True)
class Figures:
    """What one side took for one block."""

    seconds: float
    peak_bytes: int | None
    loss_before: float
    loss_after: float


def subject_of(shape: Shape, device: torch.device, seed: int) -> Subject:
    """A block of random weights; its inputs are random, its targets what it makes of them."""
    torch.manual_seed(seed)
    dense = Layer(shape).to(device)
    heldout = max(1, round(shape.windows * HELDOUT_SHARE))
    inputs = Activations(shape.windows + heldout, shape.seqlen, shape.hidden, device=device)
    inputs.states.normal_()
    targets = inputs.map(dense, shape.batch, inputs.empty_like())
    pattern = SparsityPattern.unstructured(0.5)
    masks = {name: magnitude_mask(w, pattern) for name, w in dense.named_parameters() if w.dim() == 2}
    parts = [
        Activations.filled(states.states[rows], device=device)
        for rows in (slice(shape.windows), slice(shape.windows, None))
        for states in (inputs, targets)
    ]
    io = BlockIO(
        inputs=parts[0],
        targets=parts[1],
        heldout_inputs=parts[2],
        heldout_targets=parts[3],
        forward=lambda module, hidden: module(hidden),
        device=device,
        amp_dtype=mixed_precision(device),
    )
    return Subject(dense, masks, io)


def product(subject: Subject, shape: Shape, lr: float, *, compiled: bool) -> Figures:
    """The repair of `compress run`."""
    block = copy.deepcopy(subject.dense)
    forward = torch.compile(lambda module, hidden: module(hidden)) if compiled else subject.io.forward
    io = BlockIO(**{**vars(subject.io), "forward": forward})
    recipe = RecoveryRecipe(epochs=shape.epochs, batch_size=shape.batch)
    told: list[float] = []

    def work() -> None:
        done = repair(block, subject.masks, io, recipe, lr=lr, seed=0)
        told.extend((done.loss_before, done.loss_after))

    seconds, peak = _measured(work, io.device)
    return Figures(seconds, peak, told[0], told[1])


class MaskedLinear(nn.Module):
    """The published layer: a float32 mask beside the weight, multiplied in every forward pass."""

    def __init__(self, weight: Tensor, mask: Mask) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.mask = nn.Parameter(mask.float(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(hidden, self.mask * self.weight)


def published(subject: Subject, shape: Shape, lr: float) -> Figures:
    """The loop as published: what it computes and in which order, none of its lines."""
    device = subject.io.device
    block = copy.deepcopy(subject.dense)
    for name, mask in subject.masks.items():
        path, _, attribute = name.removesuffix(".weight").rpartition(".")
        weight = block.get_parameter(name).detach()
        setattr(block.get_submodule(path), attribute, MaskedLinear(weight, mask.to(device)))
    # Its states lie in pageable memory; these are copies, as the product's may be page-locked.
    inputs, targets = (
        states.states.clone(memory_format=torch.contiguous_format)
        for states in (subject.io.inputs, subject.io.targets)
    )
    losses: list[float] = []

    def work() -> None:
        losses.extend(_published_losses(block, inputs, targets, shape, device, lr))

    seconds, peak = _measured(work, device)
    return Figures(seconds, peak, losses[0], losses[1])


def _published_losses(
    block: nn.Module, inputs: Tensor, targets: Tensor, shape: Shape, device: torch.device, lr: float
) -> Iterator[float]:
    """Train; the loss over the calibration windows before and after."""
    half = device.type == "cuda"
    trained = [weight for name, weight in block.named_parameters() if "mask" not in name]

    def loss_of(rows: list[int]) -> Tensor:
        with torch.autocast(device.type, dtype=torch.float16, enabled=half):
            output = block(inputs[rows].to(device))
            return nn.functional.mse_loss(output, targets[rows].to(device))

    def over_all() -> float:
        with torch.no_grad():
            parts = in_order(len(inputs), shape.batch)
            return sum(float(loss_of(list(rows))) * len(rows) for rows in parts) / len(inputs)

    yield over_all()
    for weight in trained:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    steps = shape.epochs * len(in_order(shape.windows, shape.batch))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    generator = torch.Generator().manual_seed(0)
    for _ in range(shape.epochs):
        for rows in shuffled(shape.windows, shape.batch, generator):
            loss = loss_of(rows)
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)  # of scaled gradients, as published
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            loss.item()  # it logs every step's loss
    for weight in trained:
        weight.requires_grad_(False)
    yield over_all()


def peak_flops(device: torch.device, *, side: int) -> float:
    """FLOP/s of the best of twenty square bfloat16 matmuls."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(_measured(lambda: a @ b, device)[0] for _ in range(20))
    return 2.0 * side**3 / best


def _measured(work: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Seconds until the device has done it, and the most memory that it held meanwhile."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated(device) if cuda else None


def row(name: str, found: list[Figures], shape: Shape, peak: float) -> str:
    """A line of the table; the first block, in which kernels are chosen and compiled, does not count."""
    counted = found[1:] or found
    seconds = median(one.seconds for one in counted)
    memory = max(one.peak_bytes or 0 for one in counted)
    last = counted[-1]
    cells = [
        name,
        f"{seconds:.2f}",
        f"{seconds * shape.blocks / 60:.2f}",
        f"{memory / GIB:.2f}" if memory else "not measured",
        f"{100 * shape.training_flops / seconds / peak:.1f} %",
        f"{last.loss_before:.4g} -> {last.loss_after:.4g}",
    ]
    return f"| {' | '.join(cells)} |"


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--device", default="cuda", help="cuda[:i] or cpu.")
@click.option("--small", is_flag=True, help="A tiny shape, to see that it runs.")
@click.option("--hidden", type=int, help="Instead of the shape's.")
@click.option("--mlp", type=int)
@click.option("--heads", type=int)
@click.option("--windows", type=int)
@click.option("--seqlen", type=int)
@click.option("--epochs", type=int)
@click.option("--batch", type=int)
@click.option("--measured", default=3, type=click.IntRange(min=1), help="Blocks that each side repairs.")
@click.option("--lr", default=1e-4, help="Of both sides.")
@click.option("--compile", "compiled", is_flag=True, help="The product's forward pass through torch.compile.")
def main(device: str, small: bool, measured: int, lr: float, compiled: bool, **given: int | None) -> None:
    base = SMALL if small else Shape()
    shape = Shape(**{**vars(base), **{key: value for key, value in given.items() if value is not None}})
    where = torch.device(device)
    peak = peak_flops(where, side=256 if small else 8192)
    ours, theirs = list[Figures](), list[Figures]()
    for seed in range(measured):
        subject = subject_of(shape, where, seed)
        ours.append(product(subject, shape, lr, compiled=compiled))
        theirs.append(published(subject, shape, lr))
        click.echo(
            f"{seed + 1}/{measured}: {ours[-1].seconds:.2f} s, published {theirs[-1].seconds:.2f} s", err=True
        )
    card = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    click.echo(f"{card}, torch {torch.__version__}, {peak / 1e12:.3g} TFLOP/s of bfloat16 matmul, {shape}")
    click.echo("| loop | s / block | min / model | peak GiB | of matmul peak | loss |")
    click.echo("|---|---|---|---|---|---|")
    click.echo(row("blockpress, compiled" if compiled else "blockpress", ours, shape, peak))
    click.echo(row("published", theirs, shape, peak))
    ratio = median(b.seconds / a.seconds for a, b in zip(ours[1:] or ours, theirs[1:] or theirs, strict=True))
    click.echo(f"published / blockpress: {ratio:.2f}")


if __name__ == "__main__":
    main()
