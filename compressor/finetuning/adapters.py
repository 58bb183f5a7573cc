"""Small trained factors beside frozen matrices: the block answers as W + ΔW, until ΔW is added to W.

Notation: W (out, in) is a pruned matrix, X (..., in) what enters it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UsageError
from compressor.finetuning.sparse_model import SparseModel
from compressor.linears import PrunableMatrix
from compressor.sparsity import Mask

# Query and value projections by their modules' names, and the matrices that hold them fused with the key's.
_QUERY_VALUE = {"q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"}


class Adapter(nn.Module, ABC):
    """The trained factors of one ΔW; a subclass says how they make it."""

    @abstractmethod
    def delta(self) -> Tensor:
        """ΔW (out, in)."""

    def answer(self, X: Tensor) -> Tensor:
        """ΔW X, (..., out)."""
        return nn.functional.linear(X, self.delta())


MakeAdapter = Callable[[Tensor, Mask, torch.Generator], Adapter]


class AdaptedBlock(nn.Module):
    """A block that answers as if its matrices were W + ΔW; it has the block's own call.

    Dropout falls on X on its way to ΔW. The experts of a fused parameter are no modules that X could be taken
    from; their ΔW is added to the parameter, without dropout.

    Args:
        block: Frozen.
        adapters: By matrix.
        dropout: Share of X's numbers that are set to 0 in training mode.
    """

    def __init__(self, block: nn.Module, adapters: Mapping[PrunableMatrix, Adapter], dropout: float) -> None:
        super().__init__()
        # In a tuple the block is no submodule: training mode is the adapters' alone.
        self._frozen = (block,)
        self._matrices = list(adapters)
        self._adapters = nn.ModuleList(adapters.values())
        self._dropout = dropout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block makes of its arguments."""
        (block,) = self._frozen
        with self._beside(block):
            return torch.func.functional_call(block, self._experts(block), args, kwargs)

    def merge(self) -> None:
        """Add every ΔW to its W."""
        (block,) = self._frozen
        with torch.no_grad():
            for matrix, adapter in self._pairs():
                matrix.of(block).add_(adapter.delta())

    def _pairs(self) -> Iterator[tuple[PrunableMatrix, Adapter]]:
        for matrix, adapter in zip(self._matrices, self._adapters, strict=True):
            assert isinstance(adapter, Adapter)
            yield matrix, adapter

    @contextmanager
    def _beside(self, block: nn.Module) -> Iterator[None]:
        """While inside, linear layers add ΔW X to their output."""
        with ExitStack() as hooks:
            for matrix, adapter in self._pairs():
                if matrix.expert is None:
                    module = block.get_submodule(matrix.module)
                    hooks.callback(module.register_forward_hook(self._adding(adapter)).remove)
            yield

    def _adding(self, adapter: Adapter) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            X = nn.functional.dropout(args[0], self._dropout, self.training)
            return output + adapter.answer(X)

        return hook

    def _experts(self, block: nn.Module) -> dict[str, Tensor]:
        """Fused parameters with the ΔW of their experts added."""
        deltas: dict[str, dict[int, Tensor]] = {}
        for matrix, adapter in self._pairs():
            if matrix.expert is not None:
                delta = adapter.delta()
                own = deltas.setdefault(matrix.parameter, {})
                own[matrix.expert] = delta.mT if matrix.transposed else delta
        changed = {}
        for name, of_experts in deltas.items():
            fused = block.get_parameter(name)
            none = torch.zeros_like(fused[0])
            changed[name] = fused + torch.stack([of_experts.get(e, none) for e in range(len(fused))])
        return changed


class Adapters:
    """A parametrisation: adapters beside some of the pruned matrices of every block.

    Args:
        model: Its blocks stay as they are until the merge.
        make: The adapter of a matrix, given W, its mask and a generator of random numbers.
        targets: ``qv``, or ``all``.
        dropout: Share of X's numbers that are set to 0 in training.
        seed: Of the factors' first values.

    Raises:
        UsageError: E-ADAPTER-TARGETS: no pruned matrix is among the targets.
    """

    def __init__(
        self, model: SparseModel, make: MakeAdapter, *, targets: str = "all", dropout: float, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._blocks = [
            AdaptedBlock(
                block,
                {
                    matrix: make(matrix.of(block), _mask_of(matrix, block, masks), generator)
                    for matrix in _targeted(matrices, targets)
                },
                dropout,
            ).to(model.device)
            for block, masks, matrices in zip(model.blocks, model.masks, model.matrices, strict=True)
        ]
        self.blocks: Sequence[nn.Module] = self._blocks
        self.weights: Sequence[nn.Parameter] = [w for block in self._blocks for w in block.parameters()]
        self.count = sum(weight.numel() for weight in self.weights)
        if not self.weights:
            raise UsageError(
                "E-ADAPTER-TARGETS",
                f"no pruned matrix is among the targets {targets!r} of the adapters",
                "choose the targets all, or prune the query and value projections too",
            )

    def train(self, mode: bool) -> None:
        """Dropout on or off."""
        for block in self._blocks:
            block.train(mode)

    def zero_gradients(self) -> None:
        """Nothing: the blocks' own weights have no gradients."""

    def merge(self) -> None:
        """Add every ΔW to its W."""
        for block in self._blocks:
            block.merge()


def _mask_of(matrix: PrunableMatrix, block: nn.Module, masks: Mapping[str, Mask]) -> Mask:
    """The matrix' mask (out, in); where heads and neurons were taken out, all of what is left is kept."""
    if matrix.parameter in masks:
        return matrix.of_mask(masks[matrix.parameter])
    return torch.ones_like(matrix.of(block), dtype=torch.bool)


def _targeted(matrices: Sequence[PrunableMatrix], targets: str) -> list[PrunableMatrix]:
    """The matrices that get an adapter."""
    if targets == "all":
        return list(matrices)
    return [matrix for matrix in matrices if matrix.parameter.split(".")[-2] in _QUERY_VALUE]
