"""A pruned model that several repairs start from: masks, weights and shapes, block by block, as one pass left them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.models.structure import BlockStructure, difference, reshape_block
from compressor.run.atomic import replacing
from compressor.sparsity import Mask
from exporters.masks import pack_mask, read_masks, write_masks

Notes = tuple[str, ...]


class PrunedModel(Protocol):
    """Blocks that an earlier pass has pruned."""

    def has(self, index: int) -> bool:
        """Whether block ``index`` is there."""
        ...

    def apply(self, index: int, block: nn.Module) -> tuple[dict[str, Mask], Notes]:
        """Turn the dense ``block`` into the pruned one; its masks by parameter, and the pruner's notes."""
        ...

    def keep(self, index: int, block: nn.Module, masks: Mapping[str, Mask], notes: Notes) -> None:
        """Take note of a block that was pruned just now and is not repaired yet."""
        ...


class NoPrunedModel:
    """Nothing was pruned before, and nothing is kept for later."""

    def has(self, index: int) -> bool:
        """False."""
        return False

    def apply(self, index: int, block: nn.Module) -> tuple[dict[str, Mask], Notes]:
        """There is nothing to apply.

        Raises:
            KeyError: Always.
        """
        raise KeyError(index)

    def keep(self, index: int, block: nn.Module, masks: Mapping[str, Mask], notes: Notes) -> None:
        """Nothing."""


class StoredPrunedModel:
    """A pruned model in the files of a folder: packed masks, and those weights that are not simply the dense ones.

    Args:
        folder: Of this model, pruner, target and windows.
        load_dense: A copy of dense block ``index``.
        recording: Whether blocks are kept; else they are only read.
    """

    def __init__(self, folder: Path, load_dense: Callable[[int], nn.Module], *, recording: bool) -> None:
        self._folder, self._load_dense, self._recording = folder, load_dense, recording

    def has(self, index: int) -> bool:
        """Whether block ``index`` is there."""
        return not self._recording and self._masks(index).is_file()

    def apply(self, index: int, block: nn.Module) -> tuple[dict[str, Mask], Notes]:
        """Turn the dense ``block`` into the pruned one; its masks by parameter, and the pruner's notes."""
        with safe_open(self._weights(index), framework="pt") as stored:
            told = stored.metadata()
        structure = BlockStructure.model_validate_json(told["structure"])
        reshape_block(block, structure, f"block {index}")
        parameters = dict(block.named_parameters())
        masks = {
            name: torch.from_numpy(mask).to(parameters[name].device)
            for name, mask in read_masks(self._masks(index)).items()
        }
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].copy_(parameters[name].masked_fill(~mask, 0.0))
            with safe_open(self._weights(index), framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  # no mapping, though it has keys
                    parameters[name].copy_(stored.get_tensor(name))
        return masks, tuple(json.loads(told["notes"]))

    def keep(self, index: int, block: nn.Module, masks: Mapping[str, Mask], notes: Notes) -> None:
        """Write the block, where this is a recording one."""
        if not self._recording:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        whole = self._load_dense(index)
        structure = difference(block, whole)
        dense = dict(whole.named_parameters())
        changed = {}
        for name, weight in block.named_parameters():
            plain: Tensor | None = dense.get(name)  # none for the bias that stands in for what was taken out
            if plain is not None and name in masks:
                plain = plain.masked_fill(~masks[name], 0.0)
            if plain is None or not torch.equal(weight, plain):
                changed[name] = weight.detach().cpu().contiguous()
        told = {"notes": json.dumps(notes), "structure": structure.model_dump_json()}
        with replacing(self._weights(index)) as draft:
            save_file(changed, draft, metadata=told)
        with replacing(self._masks(index)) as draft:  # comes last: it says that the block is whole
            write_masks(draft, {name: pack_mask(mask.cpu().numpy()) for name, mask in masks.items()})

    def _masks(self, index: int) -> Path:
        return self._folder / f"{index}.masks.safetensors"

    def _weights(self, index: int) -> Path:
        return self._folder / f"{index}.weights.safetensors"
