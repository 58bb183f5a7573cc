"""Where decoder blocks come from, one at a time, and what stands before and behind them.

Notation: B windows of T tokens, hidden width D, vocabulary V.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.errors import InputRefused, ReportedError
from compressor.models.checkpoint import Checkpoint, first_line
from compressor.models.loading import load_without_experts, refuse_unusable, restore_float32_buffers
from compressor.models.mapped import MappedFiles
from compressor.models.quiet import quiet_transformers
from compressor.models.registry import Architecture
from exporters.probe import BlockCall, capture, find_blocks, run_head

__all__ = ["BlockSource", "LoadedSource", "max_seqlen", "open_source"]

# Shapes (B, T) whose masks and tables are kept: full and last batch of calibration, held-out and evaluation
# windows.
_KEPT_SHAPES = 6
_DEFAULT_MAX_SEQLEN = 2048


class BlockSource(Protocol):
    """The blocks of a model, one at a time; an implementation may stream them from the disk.

    Windows are unpadded and start at position 0; no cache is used.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    config: Any
    num_blocks: int
    blocks_name: str  # path of the blocks' list in the model, such as "model.layers"
    hidden_size: int  # width of the hidden state between blocks
    vocab_size: int  # rows of the embedding
    max_seqlen: int
    num_parameters: int  # weights of the whole model, tied ones once

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden state (B, T, D) that enters the first block for ``ids`` (B, T) int64, on the device."""
        ...

    def block_structure(self, index: int) -> nn.Module:
        """A block for looking at names and shapes only."""
        ...

    def load_block(self, index: int) -> nn.Module:
        """A dense block of its own, in float32 on the device, in eval mode, without gradients."""
        ...

    def forward(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """What ``block``, in the place of block ``index``, makes of ``hidden`` (B, T, D)."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (B, T, V) float32 of the last block's output ``hidden`` (B, T, D)."""
        ...

    def rest_tensors(self) -> Mapping[str, Tensor]:
        """What is stored of the model besides its blocks, by full name; tied weights share storage."""
        ...

    def ends(self) -> Mapping[str, nn.Module]:
        """Embedding and head by the full names of their weights; a head that is tied to the embedding is left out."""
        ...

    def output_module(self) -> nn.Module:
        """The head, tied or not."""
        ...

    def stored_form(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors by full name, under the names and in the form that checkpoints of this type store."""
        ...

    def close(self) -> None:
        """Let go of the weights."""
        ...


class LoadedSource:
    """A source that holds embedding, norm and head in the compute dtype, and views of the blocks as they are stored.

    A block whose weights are stored in the dtype and form that its model wants takes no memory but the file's pages,
    which are given back once it has been read; fused experts are read each time, others (a mix of dtypes) lie in host
    memory.

    Args:
        checkpoint: The model.
        device: Where blocks, embedding and head compute.
        compute_dtype: What they compute in.
        stored_dtype: What the finished model is to be stored in. Embedding, final norm and head are rounded
            to it at once, since they ship as they are; blocks are rounded when they are committed.

    Raises:
        InputRefused: The files do not fill the model; weights are not finite, or beyond the stored dtype's range.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        compute_dtype: torch.dtype = torch.float32,
        *,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.architecture
        self._device, self._dtype = device, compute_dtype
        self._model, self._experts = load_without_experts(checkpoint, checkpoint.dtype)
        self._mapped = MappedFiles(checkpoint.weights.paths)
        restore_float32_buffers(self._model)
        self.config = self._model.config
        self.num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        with self._first_run(), self._experts.first_filled(self._model):
            self._blocks = find_blocks(self._model)
        self.num_blocks, self.blocks_name = len(self._blocks), self._blocks.name
        stored = checkpoint.dtype if stored_dtype is None else stored_dtype
        for index, block in enumerate(self._blocks.modules):
            named = ((f"{self.blocks_name}.{index}.{name}", t) for name, t in block.state_dict().items())
            refuse_unusable(((name, self._experts.values(name, t)) for name, t in named), stored)
            self._mapped.give_back(block.parameters())
        refuse_unusable(self.rest_tensors().items(), stored)
        self._move_all_but_blocks(stored)
        self._calls: OrderedDict[tuple[int, ...], Sequence[BlockCall]] = OrderedDict()
        self.vocab_size = int(self._model.get_input_embeddings().weight.shape[0])
        self.max_seqlen = max_seqlen(self.config)
        with self._first_run():
            self.hidden_size = self.embed(torch.zeros((1, 2), dtype=torch.long)).shape[-1]

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden state (B, T, D) that enters the first block for ``ids`` (B, T) int64, on the device."""
        ids = ids.to(self._device)
        with quiet_transformers():
            captured = capture(
                self._model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, self._blocks
            )
        # What a block is given beside the hidden state depends on the shape alone: no padding, positions from
        # 0.
        self._keep(tuple(ids.shape), captured.calls)
        return captured.hidden

    def block_structure(self, index: int) -> nn.Module:
        """The block as it lies in host memory, fused experts on the meta device; not to be changed."""
        return self._blocks.modules[index]

    def load_block(self, index: int) -> nn.Module:
        """A dense block of its own, in the compute dtype on the device, in eval mode, without gradients."""
        original = self._blocks.modules[index]
        # The config is shared: a copy would cost more than small blocks do.
        block = copy.deepcopy(original, {id(self.config): self.config})
        self._mapped.give_back(original.parameters())
        self._experts.fill(block, f"{self.blocks_name}.{index}")
        return block.to(device=self._device, dtype=self._dtype).eval().requires_grad_(False)

    def forward(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """What ``block``, in the place of block ``index``, makes of ``hidden`` (B, T, D) on the device."""
        shape = tuple(hidden.shape[:2])
        if shape not in self._calls:
            with torch.no_grad():
                self.embed(torch.zeros(shape, dtype=torch.long))
        self._calls.move_to_end(shape)
        return self._calls[shape][index].run(block, hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (B, T, V) float32 of the last block's output ``hidden`` (B, T, D)."""
        hidden = hidden.to(device=self._device, dtype=self._dtype)
        with quiet_transformers():
            return run_head(self._model, hidden, blocks=self._blocks).float()

    def rest_tensors(self) -> Mapping[str, Tensor]:
        """What is stored of the model besides its blocks, by full name; tied weights share storage."""
        prefix = self.blocks_name + "."
        return {name: t for name, t in self._model.state_dict().items() if not name.startswith(prefix)}

    def ends(self) -> Mapping[str, nn.Module]:
        """Embedding and head by the full names of their weights; a head that is tied to the embedding is left out."""
        names: dict[int, str] = {}
        for name, parameter in self._model.named_parameters():
            names[id(parameter)] = name
        modules = (self._model.get_output_embeddings(), self._model.get_input_embeddings())
        by_name = {names[id(module.weight)]: module for module in modules}  # the embedding where they are one
        return dict(sorted(by_name.items()))

    def output_module(self) -> nn.Module:
        """The head, tied or not."""
        module: nn.Module = self._model.get_output_embeddings()
        return module

    def stored_form(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Fused experts as one matrix per expert, which is what checkpoints store; all else as it is."""
        if self.architecture.experts is None:
            return tensors
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return reverted

    def close(self) -> None:
        """Let go of the weights; the source is of no use afterwards."""
        self._calls.clear()
        del self._model, self._blocks

    def _keep(self, shape: tuple[int, ...], calls: Sequence[BlockCall]) -> None:
        # The hidden state among the arguments is replaced in every run; a copy of it would only take memory.
        self._calls[shape] = [
            BlockCall((None, *call.args[1:]), call.kwargs)
            if call.args
            else BlockCall((), {key: value for key, value in call.kwargs.items() if key != "hidden_states"})
            for call in calls
        ]
        self._calls.move_to_end(shape)
        while len(self._calls) > _KEPT_SHAPES:
            self._calls.popitem(last=False)

    @contextmanager
    def _first_run(self) -> Iterator[None]:
        """Tell of a model that cannot compute, while parts of it run for the first time, as a wrong config."""
        try:
            yield
        except (ReportedError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the model's own code raises for a value that it cannot use
            if "memory" in str(error):
                raise
            raise InputRefused(
                "E-CONFIG-INVALID",
                f"the {self.architecture.label} model that config.json describes does not run: "
                f"{type(error).__name__}: {first_line(error)}",
                "fetch the model again: config.json and weights do not belong together",
            ) from error

    def _move_all_but_blocks(self, stored: torch.dtype) -> None:
        parent_name, _, attribute = self.blocks_name.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        blocks = getattr(parent, attribute)
        setattr(parent, attribute, nn.ModuleList())
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.copy_(parameter.to(stored))
        self._model.to(device=self._device, dtype=self._dtype)
        setattr(parent, attribute, blocks)


def open_source(
    checkpoint: Checkpoint,
    device: torch.device,
    compute_dtype: torch.dtype = torch.float32,
    *,
    stored_dtype: torch.dtype | None = None,
) -> LoadedSource:
    """The source for a checkpoint; see ``LoadedSource``."""
    return LoadedSource(checkpoint, device, compute_dtype, stored_dtype=stored_dtype)


def max_seqlen(config: Any) -> int:
    """The most tokens that the model has positions for; with alibi, which has no limit, its training length."""
    for key in ("max_position_embeddings", "seq_length"):
        limit = getattr(config, key, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return _DEFAULT_MAX_SEQLEN
