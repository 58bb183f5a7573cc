"""Attention and MLP of a block repaired one after the other, with the state between them as the first one's target.

Source: "A Free Lunch in LLM Compression", arXiv 2510.14444 (a region of one attention or one MLP is enough to repair
by). A block is out = second(mid), mid = first(x): first is the attention with its residual connection, second the
MLP with its own. The first half is tuned until mid is the dense block's, the second until out is, on what the
tuned first half gives it.

The place of mid is found by running the block, whatever its architecture: it is the first input of a direct child
module that comes after a weight matrix and before another, and through which everything that reaches the output
passes: d<u, out>/dx = (d mid/dx)^T d<u, out>/d mid for a u of no special direction. Blocks whose attention and MLP
read the same state (parallel residual connections) have no such place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import InputRefused
from compressor.linears import IgnoreRules, prunable_matrices
from compressor.recovery.block_io import BlockIO
from compressor.streams import in_order, prefetched

CUT = 1e-3  # of the gradient's length; float32 rounds to about 1e-6, a path beside mid changes it by about 1


@dataclass(frozen=True)
class Half:
    """One part of a block to be tuned: what runs and what it should give, and which weights move."""

    io: BlockIO
    weights: Sequence[nn.Parameter]


@dataclass(frozen=True)
class Midpoint:
    """Where a block's first half ends.

    Attributes:
        child: The direct child module that receives mid.
        before: Paths of the modules that run before it.
    """

    child: str
    before: frozenset[str]


def halves(block: nn.Module, io: BlockIO, weights: Sequence[nn.Parameter], batch_size: int) -> list[Half]:
    """The two halves of ``block``, to be tuned in this order.

    Args:
        block: Pruned, on ``io.device``.
        io: Windows, matrices and the dense block. With the dense model's own states (``dense_inputs``), the dense
            first half runs on them; else on the block's inputs.
        weights: What may be trained of the block.
        batch_size: Windows at a time.

    Raises:
        InputRefused: E-WINDOW-SPLIT: the block has no state between attention and MLP that all passes through.
    """
    assert io.load_dense is not None
    midpoint = find_midpoint(block, io)
    owners = {id(weight): name.rpartition(".")[0] for name, weight in block.named_parameters()}
    first = [weight for weight in weights if owners[id(weight)] in midpoint.before]
    chosen = {id(weight) for weight in first}
    second = [weight for weight in weights if id(weight) not in chosen]

    def to_midpoint(module: nn.Module, hidden: Tensor) -> Tensor:
        return _state_at(module, midpoint.child, lambda: io.forward(module, hidden), hidden)

    dense = io.load_dense()
    targets, heldout_targets = (
        states.map(lambda hidden: to_midpoint(dense, hidden), batch_size, states.empty_like())
        for states in (io.dense_inputs or io.inputs, io.heldout_dense_inputs or io.heldout_inputs)
    )
    first_io = replace(io, targets=targets, heldout_targets=heldout_targets, forward=to_midpoint)
    return [Half(first_io, first), Half(io, second)]


def find_midpoint(block: nn.Module, io: BlockIO) -> Midpoint:
    """The place between attention and MLP.

    Raises:
        InputRefused: E-WINDOW-SPLIT: there is none.
    """
    (hidden,) = next(iter(prefetched([io.inputs], in_order(1, 1))))  # (1, T, D)
    io.inputs.ranks.from_root([hidden])  # all ranks are to find the same place
    hidden.requires_grad_(True)
    every = prunable_matrices(block, io.name, IgnoreRules())
    owners = {matrix.module for matrix in every}
    with torch.enable_grad(), _observed(block) as calls:
        output = io.forward(block, hidden)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(output.shape, generator=generator).to(output)
    (whole,) = torch.autograd.grad(output, hidden, u, retain_graph=True)
    for place, (path, state) in enumerate(calls):
        before = frozenset(earlier for earlier, _ in calls[:place])
        after = {later for later, _ in calls[place:]}
        if "." in path or state is None or not before & owners or not (after - before) & owners:
            continue
        if state.numel() == hidden.numel() and _is_cut(state, hidden, output, u, whole):
            return Midpoint(path, before)
    raise InputRefused(
        "E-WINDOW-SPLIT",
        f"{io.name} has no state between attention and MLP that both halves meet in (parallel residual connections)",
        "repair it as a whole with --set recovery.window=block",
    )


def _is_cut(state: Tensor, hidden: Tensor, output: Tensor, u: Tensor, whole: Tensor) -> bool:
    """Whether the output depends on ``hidden`` through ``state`` alone, and ``state`` is not ``hidden`` itself."""
    if not state.requires_grad or torch.equal(state.reshape(hidden.shape), hidden):
        return False
    (inner,) = torch.autograd.grad(output, state, u, retain_graph=True, allow_unused=True)
    if inner is None:
        return False
    (through,) = torch.autograd.grad(state, hidden, inner, retain_graph=True)
    return float((through - whole).norm()) <= CUT * float(whole.norm())


@contextmanager
def _observed(block: nn.Module) -> Iterator[list[tuple[str, Tensor | None]]]:
    """Path and first floating input of every module of the block, in the order in which they are called."""
    calls: list[tuple[str, Tensor | None]] = []

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((path, _first_state(args, kwargs)))

        return hook

    with ExitStack() as hooks:
        for path, module in block.named_modules():
            if path:
                hooks.callback(module.register_forward_pre_hook(note(path), with_kwargs=True).remove)
        yield calls


class _Reached(Exception):
    """Carries the state out of the block's forward, which is not run any further."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


def _state_at(block: nn.Module, child: str, run: Callable[[], Tensor], hidden: Tensor) -> Tensor:
    """What enters ``child`` while the block runs, in the shape of ``hidden`` (B, T, D)."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = _first_state(args, kwargs)
        assert state is not None
        raise _Reached(state)

    handle = block.get_submodule(child).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Reached as reached:
        return reached.state.reshape(hidden.shape)
    finally:
        handle.remove()
    raise AssertionError(f"{child} was not called")


def _first_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first floating tensor among the arguments of a module."""
    given = [*args, *kwargs.values()]
    return next((one for one in given if isinstance(one, Tensor) and one.is_floating_point()), None)
