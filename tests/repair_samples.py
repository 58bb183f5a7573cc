"""A tiny residual block with masks and windows, for the tests of block repair."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.linears import IgnoreRules, prunable_matrices
from compressor.pruning.pruner import lowest_in_groups
from compressor.recovery.block_io import BlockIO
from compressor.sparsity import SparsityPattern
from compressor.streams import Activations


class TinyBlock(nn.Module):
    """x + w * down(gelu(up(norm(x)))), w from a router; and a parameter that is never used."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.norm = nn.RMSNorm(width)
            self.up = nn.Linear(width, 2 * width)
            self.down = nn.Linear(2 * width, width)
            self.router = nn.Linear(width, 1)
            self.unused = nn.Parameter(torch.ones(3))
        self.eval().requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        normed = self.norm(hidden)
        widened = nn.functional.gelu(self.up(normed))
        output: Tensor = hidden + torch.sigmoid(self.router(normed)) * self.down(widened)
        return output


@dataclass
class Sample:
    """A dense block, its pruned copy, the masks, and what the repair sees."""

    dense: TinyBlock
    block: TinyBlock
    masks: dict[str, Tensor]
    io: BlockIO


def sample(
    windows: int = 12,
    heldout: int = 4,
    seqlen: int = 6,
    amp: torch.dtype | None = None,
    *,
    width: int = 8,
    mean: float = 0.0,
    pattern: SparsityPattern | None = None,
) -> Sample:
    """A block whose linears lost half their weights, with targets of the dense block on the same inputs.

    `mean` is that of the inputs. With an N:M `pattern` the smallest weights of each group went, else random ones.
    """
    dense = TinyBlock(width)
    block = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name in ("up.weight", "down.weight"):
        weight = block.get_parameter(name)
        if pattern is None:
            masks[name] = torch.rand(weight.shape, generator=generator) > 0.5
        else:
            masks[name] = ~lowest_in_groups(weight.abs(), pattern)
        weight.masked_fill_(~masks[name], 0.0)
    inputs = mean + torch.randn(windows + heldout, seqlen, width, generator=generator)
    targets = dense(inputs)
    io = BlockIO(
        inputs=Activations.filled(inputs[:windows]),
        targets=Activations.filled(targets[:windows]),
        heldout_inputs=Activations.filled(inputs[windows:]),
        heldout_targets=Activations.filled(targets[windows:]),
        forward=lambda module, hidden: module(hidden),
        device=torch.device("cpu"),
        amp_dtype=amp,
        matrices=[m for m in prunable_matrices(block, "block", IgnoreRules()) if m.parameter in masks],
        pattern=pattern,
        load_dense=lambda: copy.deepcopy(dense),
    )
    return Sample(dense, block, masks, io)


def weights_of(block: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: weight.detach().clone() for name, weight in block.named_parameters()}
