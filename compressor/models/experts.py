"""Experts that a model fuses into one parameter, made of a checkpoint's matrix per expert when they are asked for.

transformers stacks the experts of a block as it loads them, which takes memory for all blocks. Here it builds the model
without the modules that hold them, so that their weights stay unread; they are put back without values, and a block
gets the values of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compressor.linears import is_fused_experts
from compressor.models.mapped import MappedFiles
from compressor.models.registry import StoredExperts
from compressor.models.weight_files import WeightFiles

__all__ = ["FusedExperts"]

META = torch.device("meta")


@dataclass(frozen=True)
class _Fused:
    """A parameter (E, rows, columns): for each expert, the stored names that make its rows."""

    shape: tuple[int, ...]
    experts: Sequence[Sequence[str]]


class FusedExperts:
    """The fused parameters of a model that its checkpoint stores expert by expert; none of a model without experts.

    A checkpoint that stores only some experts, in other shapes, or fused, has none here: it is loaded as
    transformers loads it, or refused with transformers' reasons.

    Args:
        outline: The model without weights.
        stored: How the checkpoint names them; ``None`` without experts.
        weights: The checkpoint's files.
        dtype: What the parameters are read in.
    """

    def __init__(
        self, outline: nn.Module, stored: StoredExperts | None, weights: WeightFiles, dtype: torch.dtype
    ) -> None:
        self._weights, self._dtype = weights, dtype
        found = {} if stored is None else dict(_fused_parameters(outline, stored))
        whole = all(_is_stored(fused, weights) for fused in found.values())
        self._fused: Mapping[str, _Fused] = found if whole else {}
        stored_names = [name for fused in self._fused.values() for names in fused.experts for name in names]
        # Open from now on, as the files are that the model's other weights are views of: they may be removed meanwhile.
        paths = sorted({weights.where[name] for name in stored_names})
        self._files: dict[Path, Any] = {path: safe_open(path, framework="pt") for path in paths}
        self._mapped = MappedFiles(paths)
        self._modules: dict[str, nn.Module] = {}

    def __bool__(self) -> bool:
        return bool(self._fused)

    def values(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of that full name: what was read anew if it is fused here, else ``tensor`` itself."""
        return self.read(name) if name in self._fused else tensor

    def read(self, name: str) -> Tensor:
        """The parameter of that full name, (E, rows, columns), on the host."""
        fused = self._fused[name]
        values = torch.empty(fused.shape, dtype=self._dtype)
        for expert, names in enumerate(fused.experts):
            for name_of_rows, rows in zip(names, values[expert].chunk(len(names)), strict=True):
                stored = self._files[self._weights.where[name_of_rows]].get_tensor(name_of_rows)
                rows.copy_(stored)
                self._mapped.give_back([stored])
        return values

    def take_out(self, model: nn.Module) -> None:
        """Leave a model without the modules of these parameters, so that nothing loads them."""
        for path in self._paths():
            self._modules[path] = model.get_submodule(path)
            model.set_submodule(path, nn.Identity())

    def put_back(self, model: nn.Module) -> None:
        """Give a model the modules that were taken out of it, their parameters without values."""
        for path, module in self._modules.items():
            model.set_submodule(path, module.to(META, self._dtype).eval().requires_grad_(False))
        self._modules.clear()

    def fill(self, module: nn.Module, path: str) -> None:
        """Give those of a module, which stands at ``path`` of the model, their values."""
        for own in [name for name, _ in module.named_parameters()]:
            full = f"{path}.{own}"
            if full in self._fused:
                owner, _, last = own.rpartition(".")
                values = nn.Parameter(self.read(full), requires_grad=False)
                setattr(module.get_submodule(owner), last, values)

    @contextmanager
    def first_filled(self, model: nn.Module) -> Iterator[None]:
        """The first experts of the model with their values, as long as the context lasts."""
        paths = self._paths()[:1]
        for path in paths:
            self.fill(model.get_submodule(path), path)
        try:
            yield
        finally:
            for path in paths:
                model.get_submodule(path).to(META)

    def _paths(self) -> list[str]:
        """Where the modules of these parameters stand in the model."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self._fused))


def _fused_parameters(outline: nn.Module, stored: StoredExperts) -> Iterator[tuple[str, _Fused]]:
    """The fused parameters by full name, block by block."""
    for path, module in outline.named_modules():
        if is_fused_experts(module):
            block = path.rsplit(".", 2)[0]
            for own, parameter in module.named_parameters():
                experts = [
                    [f"{block}.{stored.module}.{expert}.{matrix}.weight" for matrix in stored.of(own)]
                    for expert in range(len(parameter))
                ]
                yield f"{path}.{own}", _Fused(tuple(parameter.shape), experts)


def _is_stored(fused: _Fused, weights: WeightFiles) -> bool:
    """Whether the files have every expert of a parameter, in the shape that it has there."""
    _, rows, columns = fused.shape
    return all(
        name in weights.tensors and weights.tensors[name].shape == (rows // len(names), columns)
        for names in fused.experts
        for name in names
    )
