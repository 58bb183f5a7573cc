"""What a decoder block receives, found by running the model with its blocks replaced by recording modules.

A causal language model is a prologue (embeddings, positions, masks), N decoder blocks, and an epilogue (final
norm, head). None of what follows knows an architecture: the blocks are swapped for modules that note their
arguments and hand the hidden state on, so that the model itself shows which masks, rotary tables or biases
each block is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from exporters.errors import ExportError

__all__ = ["BlockCall", "BlockList", "Captured", "capture", "find_blocks", "replaced_blocks", "run_head"]


@dataclass(frozen=True)
class BlockList:
    """The decoder blocks of a model.

    Attributes:
        name: Path of the list in the model, such as ``model.layers``.
        modules: The blocks, first to last.
        returns_tuple: Whether a block returns ``(hidden, ...)`` rather than the hidden state itself.
    """

    name: str
    modules: tuple[nn.Module, ...]
    returns_tuple: bool

    def __len__(self) -> int:
        return len(self.modules)

    def block_name(self, index: int) -> str:
        """Return the full path of one block, such as ``model.layers.3``."""
        return f"{self.name}.{index}"


@dataclass(frozen=True)
class BlockCall:
    """The arguments that the model gave to one block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden state among the arguments, (B, T, D)."""
        found: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, depth first; the hidden state is one of them."""
        return [leaf for leaf in pytree.tree_leaves(self._arguments()) if isinstance(leaf, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> BlockCall:
        """Return the same call with its tensors, in the order of `tensors()`, replaced."""
        remaining = iter(tensors)
        args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(remaining), self._arguments())
        return BlockCall(args, kwargs)

    def run(self, block: nn.Module, hidden: Tensor, cache: Cache | None = None) -> Tensor:
        """Return what `block` makes of `hidden` (B, T, D) under these arguments, (B, T, D).

        Args:
            block: A decoder block of the model that was probed.
            hidden: Takes the place of the hidden state that was recorded; batch and length must be the same.
            cache: Takes the place of the key-value cache that was recorded, if there was one.
        """
        args, kwargs = pytree.tree_map_only(Cache, lambda _: cache, self._arguments())
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        return _hidden_of(block(*args, **kwargs))

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.args, dict(self.kwargs)


@dataclass(frozen=True)
class Captured:
    """What one run of the prologue delivers: the hidden state (B, T, D) and the call of each block."""

    hidden: Tensor
    calls: tuple[BlockCall, ...]


class _StandIn(nn.Module):
    """Takes a block's place and returns what `answer` makes of the call."""

    def __init__(self, block: nn.Module, answer: Callable[[BlockCall], Tensor], as_tuple: bool) -> None:
        super().__init__()
        # In a tuple the block is no submodule, so that its parameters are not part of the probed model.
        self._replaced = (block,)
        self._answer = answer
        self._as_tuple = as_tuple

    def __getattr__(self, name: str) -> Any:
        # Parents read attributes of their blocks (attention_type); whatever is not here comes from the block.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self._answer(BlockCall(args, kwargs))
        return (hidden, None) if self._as_tuple else hidden


class _FirstCall(Exception):
    """Carries the first block's arguments out of the model's forward."""

    def __init__(self, call: BlockCall) -> None:
        super().__init__()
        self.call = call


def find_blocks(model: nn.Module) -> BlockList:
    """Return the decoder blocks of a Hugging Face causal language model.

    They are the module list with as many entries as the configuration has hidden layers. The first block is
    run on two tokens (on the meta device if that is where its weights are) to see what it returns.

    Raises:
        ExportError: E-EXPORT-NO-BLOCKS when there is no such list.
    """
    config: Any = model.config
    depth = int(config.get_text_config().num_hidden_layers)
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not candidates:
        raise ExportError(
            "E-EXPORT-NO-BLOCKS",
            f"{type(model).__name__} has no module list of {depth} decoder blocks",
            "Use a decoder-only causal language model of a supported architecture.",
        )
    # Where a block holds a list of the same length, its own list is the larger one.
    name, found = max(candidates, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    blocks = BlockList(name, tuple(found), returns_tuple=False)
    return BlockList(name, tuple(found), returns_tuple=_returns_tuple(model, blocks))


def capture(model: nn.Module, inputs: Mapping[str, Any], blocks: BlockList | None = None) -> Captured:
    """Return the hidden state that enters the first block and what each block is given; runs no block.

    Args:
        model: A causal language model in eval mode; its blocks' weights are not touched.
        inputs: Keyword arguments of its forward, such as ``{"input_ids": ids}``. A cache is used only if
            ``past_key_values`` is among them.
        blocks: The result of `find_blocks`, to spare finding them again.
    """
    blocks = blocks or find_blocks(model)
    calls: list[BlockCall] = []

    def record(index: int, call: BlockCall) -> Tensor:
        calls.append(call)
        return call.hidden

    with torch.no_grad(), replaced_blocks(model, blocks, record):
        model(**_with_cache_choice(inputs))
    return Captured(calls[0].hidden, tuple(calls))


def run_head(model: nn.Module, hidden: Tensor, *, blocks: BlockList | None = None, **inputs: Any) -> Tensor:
    """Return the logits (B, T, V) that the model makes of the last block's output `hidden` (B, T, D).

    The model runs with its blocks replaced by modules that return `hidden`, so that final norm, head and
    soft-capping are the model's own. Without ``input_ids`` among `inputs` the prologue, whose result is not
    used, sees zeros.
    """
    if "input_ids" not in inputs:
        inputs.update(_zeros(hidden.shape[0], hidden.shape[1], hidden.device))
    with replaced_blocks(model, blocks or find_blocks(model), lambda index, call: hidden):
        logits: Tensor = model(**_with_cache_choice(inputs)).logits
    return logits


@contextmanager
def replaced_blocks(
    model: nn.Module, blocks: BlockList, answer: Callable[[int, BlockCall], Tensor]
) -> Iterator[None]:
    """Replace the blocks, while the context is open, by modules that return ``answer(index, call)``."""
    parent_name, _, attribute = blocks.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    original = getattr(parent, attribute)
    stand_ins = [
        _StandIn(block, partial(answer, index), blocks.returns_tuple)
        for index, block in enumerate(blocks.modules)
    ]
    setattr(parent, attribute, nn.ModuleList(stand_ins))
    try:
        yield
    finally:
        setattr(parent, attribute, original)


def _returns_tuple(model: nn.Module, blocks: BlockList) -> bool:
    first = blocks.modules[0]
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    tokens = _zeros(1, 2, next(embedding.parameters()).device)
    call: BlockCall | None = None

    def interrupt(index: int, call: BlockCall) -> Tensor:
        raise _FirstCall(call)

    with torch.no_grad(), replaced_blocks(model, blocks, interrupt):
        try:
            model(**tokens, use_cache=False)
        except _FirstCall as stopped:
            call = stopped.call
    if call is None:
        raise ExportError(
            "E-EXPORT-NO-BLOCKS",
            f"{type(model).__name__} does not call the modules in {blocks.name}",
            "Use a decoder-only causal language model of a supported architecture.",
        )
    device = next(first.parameters()).device
    call = call.with_tensors([tensor.to(device) for tensor in call.tensors()])
    with torch.no_grad():
        return isinstance(first(*call.args, **call.kwargs), tuple)


def _zeros(batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    # A mask comes along, since some models warn of zeros that might be padding.
    ids = torch.zeros((batch, length), dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _hidden_of(returned: Any) -> Tensor:
    hidden: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return hidden


def _with_cache_choice(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_cache": "past_key_values" in inputs, **inputs}
