"""Activations rounded to int8 before a linear, row by row, as the packed format says (``runtime/FORMAT.md``).

In fused experts what enters the first two matrices is rounded, and what enters the third between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.linears import expert_activations, is_fused_experts

__all__ = ["quantized_modules", "round_activations", "rounded_inputs", "rounds_its_inputs"]

_LARGEST = 127


def round_activations(X: Tensor) -> Tensor:
    """X (..., K) with each row in whole steps of its largest magnitude / 127; a row of zeros stays."""
    step = X.abs().amax(dim=-1, keepdim=True) / _LARGEST
    step = torch.where(step == 0, 1.0, step)
    return (X / step).round() * step


def rounds_its_inputs(module: nn.Module) -> Callable[[], None]:
    """Round what enters the matrices of ``module`` from now on; returns what ends that.

    Args:
        module: A linear, or fused experts.
    """
    if not is_fused_experts(module):
        return module.register_forward_pre_hook(_hook).remove
    before = module.__dict__.get("forward")
    module.forward = partial(_rounded_experts, module)

    def end() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    return end


@contextmanager
def rounded_inputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Round what enters the matrices of each of ``modules`` while the context is open."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(rounds_its_inputs(module))
        yield


def quantized_modules(model: Any, names: Iterable[str]) -> list[nn.Module]:
    """The linears and fused experts of a language model whose weights are quantised, and its head, which may be tied.

    Args:
        model: The model.
        names: Full names of the quantised parameters, the embedding's among them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {path: model.get_submodule(path) for path in (name.rpartition(".")[0] for name in names)}
    return [*(module for module in modules.values() if module not in (embedding, head)), head]


def _rounded_experts(experts: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Σ_e p_e · down_e(round(act(gate_e x) ⊙ up_e x)), x rounded.

    Args:
        experts: The fused experts.
        hidden: Tokens (n, D).
        chosen: Experts of each token (n, k).
        shares: How much each of them counts, p (n, k).
    """
    X, output = round_activations(hidden), torch.zeros_like(hidden)
    for expert in torch.unique(chosen).tolist():
        token, place = torch.where(chosen == expert)
        between = round_activations(expert_activations(experts, expert, X[token]))
        of_expert = nn.functional.linear(between, experts.down_proj[expert])
        output.index_add_(0, token, (of_expert * shares[token, place, None]).to(output.dtype))
    return output


def _hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_activations(args[0]), *args[1:])
