"""Which blocks are alike: one of each kind is traced, its graph serves the others with their own weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from exporters.block_cache import BlockCache
from exporters.errors import ExportError
from exporters.parts import ModelParts, named_tensors
from exporters.probe import BlockCall, BlockList, Captured

__all__ = ["KeyValueShape", "Template", "find_templates"]

_Signature = tuple[Any, ...]
_SCALARS = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class KeyValueShape:
    """What a block keeps per token: heads and width of its keys and of its values, and their dtype."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Template:
    """Blocks that differ in nothing but their weights.

    Attributes:
        source: Index of the block that is traced.
        members: Indices of all the blocks that its graph serves, `source` among them.
        call: What the model gives to each of them.
        key_value: What each of them keeps per token.
    """

    source: int
    members: tuple[int, ...]
    call: BlockCall
    key_value: KeyValueShape


def find_templates(parts: ModelParts, captured: Captured, past: int) -> list[Template]:
    """Return the blocks in groups of the same structure, in the order of their first members.

    Two blocks are alike when class, parameter shapes, scalar attributes, and the very tensors that the model
    gives them are the same. An attribute that is the block's own number in every block does not count, unless
    setting it to another member's number changes what the block computes.

    Args:
        captured: The calls of a run with a cache of `past` tokens.
    """
    blocks = parts.blocks
    number_attributes = _number_attributes(blocks)
    groups: dict[_Signature, list[int]] = {}
    for index, (block, call) in enumerate(zip(blocks.modules, captured.calls, strict=True)):
        signature = (*_structure(block, number_attributes), *_call_structure(call, captured.hidden))
        groups.setdefault(signature, []).append(index)
    templates = []
    for members in groups.values():
        call = captured.calls[members[0]]
        with parts.block(members[0]) as block:
            run = partial(_run, block, call, captured.hidden, past)
            key_value, _ = run()
            apart = len(members) > 1 and _number_matters(block, number_attributes, members[-1], run)
        for group in [[index] for index in members] if apart else [members]:
            templates.append(Template(group[0], tuple(group), captured.calls[group[0]], key_value))
    return sorted(templates, key=lambda template: template.source)


def _number_attributes(blocks: BlockList) -> frozenset[tuple[str, str]]:
    """Return the attributes (module path, name) that hold the block's own number in every block."""
    candidates: set[tuple[str, str]] | None = None
    for index, block in enumerate(blocks.modules):
        own = {(path, name) for path, name, value in _scalars(block) if type(value) is int and value == index}
        candidates = own if candidates is None else candidates & own
    return frozenset(candidates or ()) if len(blocks) > 1 else frozenset()


def _scalars(block: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yield (module path, attribute, value) for attributes that are scalars or rows of scalars."""
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            entries = value if isinstance(value, (list, tuple)) else (value,)
            if all(isinstance(entry, _SCALARS) for entry in entries):
                yield path, name, value


def _structure(block: nn.Module, number_attributes: frozenset[tuple[str, str]]) -> _Signature:
    classes = tuple((path, type(module)) for path, module in block.named_modules())
    tensors = tuple((name, tuple(t.shape), t.dtype) for name, t in named_tensors(block).items())
    scalars = tuple(
        (path, name, repr(value))
        for path, name, value in _scalars(block)
        if (path, name) not in number_attributes
    )
    return classes, tensors, scalars


def _call_structure(call: BlockCall, hidden: Tensor) -> _Signature:
    """Return what the model gives to a block: the identity of each tensor, the value of everything else."""

    def token(leaf: Any) -> Any:
        if leaf is call.hidden:
            return "hidden", tuple(hidden.shape)
        return (
            id(leaf) if isinstance(leaf, Tensor) else repr(leaf) if isinstance(leaf, _SCALARS) else type(leaf)
        )

    leaves, structure = pytree.tree_flatten((call.args, dict(call.kwargs)))
    return tuple(token(leaf) for leaf in leaves), structure


def _run(block: nn.Module, call: BlockCall, hidden: Tensor, past: int) -> tuple[KeyValueShape, Tensor]:
    cache = BlockCache(past)
    with torch.no_grad():
        returned = call.run(block, hidden, cache)
    if cache.present is None:
        raise ExportError(
            "E-EXPORT-NO-CACHE",
            f"{type(block).__name__} runs without updating the key-value cache it is given",
            "Export a decoder whose blocks all attend to a key-value cache.",
        )
    key, value = cache.present
    return KeyValueShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3], key.dtype), returned


def _number_matters(
    block: nn.Module,
    attributes: frozenset[tuple[str, str]],
    number: int,
    run: Callable[[], tuple[KeyValueShape, Tensor]],
) -> bool:
    """Return whether `block` computes something else when its number attributes are set to `number`."""
    _, own = run()
    before = {(path, name): getattr(block.get_submodule(path), name) for path, name in attributes}
    try:
        for path, name in attributes:
            setattr(block.get_submodule(path), name, number)
        return not torch.equal(own, run()[1])
    finally:
        for (path, name), value in before.items():
            setattr(block.get_submodule(path), name, value)
