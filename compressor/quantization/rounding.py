"""Activations rounded to int8 before a linear, row by row, as the packed format says (``runtime/FORMAT.md``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["quantized_linears", "round_activations", "rounded_inputs", "rounds_its_inputs"]

_LARGEST = 127


def round_activations(X: Tensor) -> Tensor:
    """X (..., K) with each row in whole steps of its largest magnitude / 127; a row of zeros stays."""
    step = X.abs().amax(dim=-1, keepdim=True) / _LARGEST
    step = torch.where(step == 0, 1.0, step)
    return (X / step).round() * step


def rounds_its_inputs(module: nn.Module) -> None:
    """Round what enters ``module`` from now on."""
    module.register_forward_pre_hook(_hook)


@contextmanager
def rounded_inputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Round what enters each of ``modules`` while the context is open."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(_hook).remove)
        yield


def quantized_linears(model: Any, names: Iterable[str]) -> list[nn.Module]:
    """The linears of a causal language model whose weights are quantised, its head among them, which may be tied.

    Args:
        model: The model.
        names: Full names of the quantised parameters, the embedding's among them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return [*(module for module in modules.values() if module not in (embedding, head)), head]


def _hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_activations(args[0]), *args[1:])
