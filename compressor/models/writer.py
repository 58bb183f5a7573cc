"""Finished blocks into a Hugging Face folder that stock transformers loads."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.errors import ReportedError
from compressor.models.loading import plain_outline, refuse_unusable
from compressor.models.source import BlockSource
from compressor.models.structure import BlockStructure, ModelStructure, difference, with_structure
from compressor.models.weight_files import INDEX
from compressor.sparsity import Mask
from exporters.masks import PackedMask, pack_mask, write_masks

__all__ = [
    "CONFIG_NAME",
    "MASKS_NAME",
    "BlockWriter",
    "CheckpointWriter",
    "RoundingWriter",
    "round_block",
    "stored_mask",
    "write_json",
]

CONFIG_NAME = "config.json"
MASKS_NAME = "masks.safetensors"
_GENERATION_NAME = "generation_config.json"
# Where the weights came from, and code that is not copied: not true of the written model.
_DROPPED_SETTINGS = frozenset(
    {"torch_dtype", "_name_or_path", "_commit_hash", "_from_model_config", "auto_map"}
)


class BlockWriter(Protocol):
    """Takes finished blocks."""

    def commit(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Take a finished block; its weights are rounded in place to the type they are stored in."""
        ...


class RoundingWriter:
    """Writes nothing: for a rank beside the one that writes, which is to hold the same weights.

    Args:
        source: Where the blocks came from.
        dtype: What the weights are stored in.
    """

    def __init__(self, source: BlockSource, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype

    def commit(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Round a finished block, as the writer does.

        Raises:
            InputRefused: E-WEIGHTS-NONFINITE, E-WEIGHTS-OVERFLOW: a weight cannot be stored.
        """
        round_block(block, f"{self._source.blocks_name}.{index}.", self._dtype)


class CheckpointWriter:
    """Writes a model block by block: one safetensors shard per block, one for the rest.

    Equal weights and masks give equal bytes.

    Args:
        folder: The folder to write; it is made, and must be empty.
        source: Where the blocks came from, and everything else of the model.
        dtype: What the weights are stored in.
        widths: Values of the config that the blocks have other widths for. What they do not explain goes into
            the config's structure (``compressor.models.structure``), and stock transformers refuses the folder.
    """

    def __init__(
        self,
        folder: Path,
        source: BlockSource,
        dtype: torch.dtype,
        *,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._source, self._dtype = folder, source, dtype
        self._widths = dict(widths or {})
        self._structures: dict[int, BlockStructure] = {}
        self._masks: dict[str, PackedMask] = {}
        self._shard_of: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    def commit(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Store a finished block.

        The block's weights are rounded to the stored dtype in place, so that what flows on is what ships. A
        weight that is kept and zero all the same, by chance or by rounding, counts as pruned in the stored
        mask, so that masks and zeros say the same.

        Args:
            index: Which block it is; each is committed once.
            block: The block, on any device.
            masks: By parameter path in the block, in the parameter's shape.

        Raises:
            InputRefused: E-WEIGHTS-NONFINITE, E-WEIGHTS-OVERFLOW: a weight cannot be stored.
            ReportedError: E-MASK-BROKEN: a pruned weight is not zero, which is a fault of this program.
        """
        prefix = f"{self._source.blocks_name}.{index}."
        round_block(block, prefix, self._dtype)
        for name, mask in masks.items():
            self._masks[prefix + name] = stored_mask(prefix + name, block.get_parameter(name), mask)
        self._structures[index] = self._structure(index, block)
        tensors = {prefix + name: tensor for name, tensor in block.state_dict().items()}
        self._write_shard(index + 1, tensors)

    def finish(self) -> None:
        """Store all that is no block: the other weights, index, configs, tokenizer, licences, masks."""
        total = self._source.num_blocks + 1
        self._write_shard(total, _without_aliases(self._source.rest_tensors()))
        order = sorted(self._shard_of)
        index = {
            "metadata": {"total_size": sum(self._sizes[name] for name in order)},
            "weight_map": {name: self._shard_of[name] for name in order},
        }
        write_json(self._folder / INDEX, index)
        write_json(self._folder / CONFIG_NAME, self._settings())
        checkpoint = self._source.checkpoint
        for path in (checkpoint.folder / _GENERATION_NAME, *checkpoint.copied_files):
            if path.is_file():
                shutil.copyfile(path, self._folder / path.name)
        write_masks(self._folder / MASKS_NAME, self._masks)

    def _write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        total = self._source.num_blocks + 1
        shard = f"model-{number:05d}-of-{total:05d}.safetensors"
        rounded = {name: _rounded(name, tensor, self._dtype).cpu() for name, tensor in tensors.items()}
        stored = {name: t.contiguous() for name, t in self._source.stored_form(rounded).items()}
        save_file(stored, self._folder / shard, metadata={"format": "pt"})
        for name, tensor in stored.items():
            self._shard_of[name] = shard
            self._sizes[name] = tensor.numel() * tensor.element_size()

    def _settings(self) -> dict[str, Any]:
        checkpoint = self._source.checkpoint
        own_code = checkpoint.architecture.remote_code
        dropped = _DROPPED_SETTINGS - ({"auto_map"} if own_code else set())
        settings = {key: value for key, value in checkpoint.settings.items() if key not in dropped}
        settings = {**settings, "dtype": str(self._dtype).removeprefix("torch."), **self._widths}
        blocks = tuple(self._structures[index] for index in sorted(self._structures))
        if all(block.is_plain for block in blocks):
            return settings
        structure = ModelStructure(
            type_without=settings["model_type"], blocks_name=self._source.blocks_name, blocks=blocks
        )
        return with_structure(settings, structure)

    def _structure(self, index: int, block: nn.Module) -> BlockStructure:
        """What of the block the config's plain values do not say."""
        if self._source.checkpoint.structure is None and not self._widths:
            came_as = self._source.block_structure(index)
            if difference(block, came_as).is_plain:
                return BlockStructure()
        return difference(block, self._plain_blocks[index])

    @functools.cached_property
    def _plain_blocks(self) -> Sequence[nn.Module]:
        model = plain_outline(self._source.checkpoint, self._widths)
        return tuple(model.get_submodule(self._source.blocks_name))


def round_block(block: nn.Module, prefix: str, dtype: torch.dtype) -> None:
    """Round the weights of a block to ``dtype`` in place, so that what flows on is what ships.

    Raises:
        InputRefused: E-WEIGHTS-NONFINITE, E-WEIGHTS-OVERFLOW: a weight cannot be stored.
    """
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(_rounded(prefix + name, parameter, dtype))


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in the stored dtype; another as it is."""
    if not tensor.is_floating_point():
        return tensor
    refuse_unusable([(name, tensor)], dtype)
    return tensor.detach().to(dtype)


def stored_mask(name: str, weight: Tensor, mask: Mask) -> PackedMask:
    """Where the weight is not zero, after it has been checked that every pruned place is.

    Raises:
        ReportedError: E-MASK-BROKEN.
    """
    kept = weight.detach() != 0
    revived = int((kept & ~mask.to(kept.device)).sum())
    if revived:
        raise ReportedError(
            "E-MASK-BROKEN",
            f"{name} has {revived} weights that are pruned and not zero",
            "report this with the recipe: it is a fault of this program",
        )
    return pack_mask(kept.cpu().numpy())


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the further names of tied ones; transformers ties them again when it loads."""
    seen: set[tuple[int, ...]] = set()
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), *tensor.shape)
        if place not in seen or not tensor.numel():
            kept[name] = tensor
        seen.add(place)
    return kept


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face writes its configs: two spaces, keys in their order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
