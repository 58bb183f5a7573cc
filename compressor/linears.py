"""The weight matrices of a block that can be pruned, and what flows into them.

Notation: W (out, in) is a matrix, X (n, in) are n tokens that enter it, E experts, k experts per token.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.errors import UsageError
from compressor.sparsity import Mask

__all__ = [
    "IgnoreRules",
    "PrunableMatrix",
    "expert_activations",
    "is_fused_experts",
    "observe_inputs",
    "prunable_matrices",
]

# Never pruned in any case, so that naming them asks for nothing and is no mistake either.
_NEVER_PRUNED = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class PrunableMatrix:
    """A matrix of a block: the weight of a linear layer, or one expert's slice of a fused parameter.

    Attributes:
        name: Unique in the block: ``self_attn.q_proj.weight``, ``mlp.experts.gate_up_proj[3]``.
        parameter: The parameter that holds it: ``mlp.experts.gate_up_proj``.
        expert: Index into the first axis of a fused parameter, or ``None``.
        transposed: Whether the parameter is stored (in, out), as GPT-2's are.
    """

    name: str
    parameter: str
    expert: int | None = None
    transposed: bool = False

    @property
    def module(self) -> str:
        """Path of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]

    def of(self, block: nn.Module) -> Tensor:
        """W (out, in): a view into the block's parameter, outside autograd; writing changes the block."""
        return self._view(block.get_parameter(self.parameter).detach())

    def of_mask(self, mask: Mask) -> Mask:
        """The same view (out, in) into a mask of the parameter's shape."""
        return self._view(mask)

    def _view(self, tensor: Tensor) -> Tensor:
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix.mT if self.transposed else matrix


class NamedBlocks(Protocol):
    """Blocks to look at, and the names of all that is no block; every block source is one."""

    num_blocks: int
    blocks_name: str

    def block_structure(self, index: int) -> nn.Module:
        """A block for looking at names and shapes only."""
        ...

    def rest_tensors(self) -> Mapping[str, Tensor]:
        """What is stored of the model besides its blocks, by full name."""
        ...


@dataclass(frozen=True)
class IgnoreRules:
    """Which matrices stay dense.

    A pattern is a glob, or a regular expression after ``re:``; it is held against the full name of a matrix
    with and without ``.weight``, and against the modules around it: ``model.layers.0`` covers all that is in
    the first block. One expert's matrix is also known as ``….gate_up_proj.3``, since brackets mean something
    else in a glob.

    Raises:
        UsageError: E-IGNORE-REGEX: a regular expression is none.
    """

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except re.error as error:
                raise UsageError(
                    "E-IGNORE-REGEX",
                    f"--ignore {pattern} is no regular expression: {error}",
                    "mend the pattern",
                ) from None

    def ignores(self, full_name: str) -> bool:
        """Whether the matrix of this full name stays dense."""
        return any(_matches(pattern, full_name) for pattern in self.patterns)

    def check_all_matched(self, source: NamedBlocks) -> None:
        """Look for something that every pattern matches, and for a matrix that none does.

        Raises:
            UsageError: E-IGNORE-NO-MATCH: a pattern matches nothing; E-IGNORE-EVERYTHING: nothing is left to prune.
        """
        names = [
            f"{prefix}.{matrix.name}"
            for index in range(source.num_blocks)
            for prefix in [f"{source.blocks_name}.{index}"]
            for matrix in prunable_matrices(source.block_structure(index), prefix, IgnoreRules())
        ]
        everything = [*names, *source.rest_tensors(), *_NEVER_PRUNED]
        for pattern in self.patterns:
            if not any(_matches(pattern, name) for name in everything):
                raise UsageError(
                    "E-IGNORE-NO-MATCH",
                    f"--ignore {pattern} matches nothing in the model",
                    f"matrices have names such as {names[0]}; globs (*.mlp.*) and re:… are understood"
                    if names
                    else "leave the pattern out",
                )
        if all(self.ignores(name) for name in names):
            raise UsageError(
                "E-IGNORE-EVERYTHING",
                "the --ignore patterns leave no matrix to prune",
                "leave one of them out",
            )


def prunable_matrices(block: nn.Module, block_name: str, ignore: IgnoreRules) -> list[PrunableMatrix]:
    """The matrices of a block that may be pruned, in the order of its modules.

    They are the weights of linear layers (``nn.Linear`` and GPT-2's ``Conv1D``) and the matrices of fused
    experts. Routers, norms and embeddings are not among them.

    Args:
        block: A decoder block.
        block_name: Its full name, such as ``model.layers.3``.
        ignore: Which matrices to leave out.
    """
    found = [matrix for path, module in block.named_modules() for matrix in _matrices_of(block, path, module)]
    return [matrix for matrix in found if not ignore.ignores(f"{block_name}.{matrix.name}")]


@contextmanager
def observe_inputs(
    block: nn.Module, matrices: Sequence[PrunableMatrix], receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``receive(name, X)`` for each matrix on every forward of the block while the context is open.

    X (n, in) is what enters the matrix. For an expert n counts only the tokens that the router sent to it,
    and the call is left out where there is none.
    """
    modules: dict[str, list[PrunableMatrix]] = {}
    for matrix in matrices:
        modules.setdefault(matrix.module, []).append(matrix)
    with ExitStack() as hooks:
        for path, own in modules.items():
            hook = _experts_hook(own, receive) if own[0].expert is not None else _linear_hook(own[0], receive)
            hooks.callback(block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


_Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def _linear_hook(matrix: PrunableMatrix, receive: Callable[[str, Tensor], None]) -> _Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering: Tensor = args[0] if args else next(iter(kwargs.values()))
        receive(matrix.name, entering.detach().reshape(-1, entering.shape[-1]))

    return hook


def _experts_hook(matrices: Sequence[PrunableMatrix], receive: Callable[[str, Tensor], None]) -> _Hook:
    """Routes the tokens once more, since the experts of a fused module are no modules that could be hooked.

    y = Σ_e p_e · down_e(act(gate_e x) ⊙ up_e x) over the k experts of a token: gate and up see x, down sees the rest.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen = (*args, *kwargs.values())[:2]  # (n, D), (n, k)
        by_expert: dict[int, list[PrunableMatrix]] = {}
        for matrix in matrices:
            assert matrix.expert is not None
            by_expert.setdefault(matrix.expert, []).append(matrix)
        with torch.no_grad():
            for expert, own in by_expert.items():
                X = hidden[(chosen == expert).any(dim=-1)]
                if not len(X):
                    continue
                for matrix in own:
                    enters_first = matrix.parameter.endswith("gate_up_proj")
                    receive(matrix.name, X if enters_first else expert_activations(module, expert, X))

    return hook


def expert_activations(experts: Any, expert: int, X: Tensor) -> Tensor:
    """act(gate x) ⊙ (up x), (n, intermediate), of one expert: what enters its down projection."""
    gate, up = nn.functional.linear(X, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    product: Tensor = experts.act_fn(gate) * up
    return product


def _matrices_of(block: nn.Module, path: str, module: nn.Module) -> Iterator[PrunableMatrix]:
    if _is_router(block, path):
        return
    if isinstance(module, nn.Linear):
        yield PrunableMatrix(f"{path}.weight", f"{path}.weight")
    elif _is_conv1d(module):
        yield PrunableMatrix(f"{path}.weight", f"{path}.weight", transposed=True)
    elif is_fused_experts(module):
        for name in ("gate_up_proj", "down_proj"):
            for expert in range(len(module.get_parameter(name))):
                yield PrunableMatrix(f"{path}.{name}[{expert}]", f"{path}.{name}", expert)


def _is_router(block: nn.Module, path: str) -> bool:
    """Whether the module chooses among experts that stand beside it."""
    parent, _, own = path.rpartition(".")
    return own in ("gate", "router") and hasattr(block.get_submodule(parent), "experts")


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as (E, 2·intermediate, D) and (E, D, intermediate)."""
    own = dict(module.named_parameters(recurse=False))
    return all(name in own and own[name].ndim == 3 for name in ("gate_up_proj", "down_proj"))


def _matches(pattern: str, full_name: str) -> bool:
    names = list(_known_as(full_name))
    if pattern.startswith("re:"):
        expression = re.compile(pattern.removeprefix("re:"))
        return any(expression.match(name) for name in names)
    return pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _known_as(full_name: str) -> Iterator[str]:
    """The names that a matrix goes by: its own, its parameter's, those of the modules around it."""
    yield full_name
    fused, bracket, expert = full_name.partition("[")
    if bracket:
        yield f"{fused}.{expert.rstrip(']')}"
        yield fused
    parts = fused.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])
