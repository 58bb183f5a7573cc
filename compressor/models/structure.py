"""Widths that differ from layer to layer: how a written folder states them, and modules made to fit them.

A config of transformers has one width for all layers. A model whose layers have their own gets another
``model_type`` (``blockpress_llama``), so that a loader that does not know of this refuses it by name, and a key of
its own in ``config.json``, documented in README.md:

    "blockpress_structure": {"version": 1, "type_without": "llama", "blocks_name": "model.layers", "blocks": [
        {"linears": {"mlp.down_proj": [64, 150], …}, "biases": ["mlp.down_proj"],
         "attributes": {"self_attn.num_key_value_groups": 1}}, …]}

``linears`` are the layers whose weight has another shape (out, in) than the plain config gives them, ``biases``
those that have a bias although the plain config gives none, ``attributes`` counts of heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from compressor.errors import InputRefused
from compressor.linear_layers import bias_of, is_linear, linears_of, resize, shape_of
from compressor.units import HEAD_COUNTS

__all__ = [
    "KEY",
    "BlockStructure",
    "ModelStructure",
    "apply_structure",
    "difference",
    "plain_type",
    "reshape_block",
    "split_settings",
    "with_structure",
]

KEY = "blockpress_structure"
PREFIX = "blockpress_"
_Size = Annotated[int, Field(ge=1, le=2**22)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BlockStructure(_Part):
    """What of one block is not as the plain config has it; paths are relative to the block."""

    linears: dict[str, Annotated[list[_Size], Field(min_length=2, max_length=2)]] = {}
    biases: tuple[str, ...] = ()
    attributes: dict[str, _Size] = {}

    @property
    def is_plain(self) -> bool:
        """Whether nothing differs."""
        return not (self.linears or self.biases or self.attributes)


class ModelStructure(_Part):
    """Every block's differences, and what the config says when they are left aside."""

    version: Literal[1] = 1
    # Not "model_type": transformers would take this mapping for the config of a model of that type.
    type_without: str
    blocks_name: str
    blocks: tuple[BlockStructure, ...]


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], ModelStructure | None]:
    """The plain settings of a ``config.json``, with the model's own type, and the structure where it has one.

    Raises:
        InputRefused: E-STRUCTURE-INVALID: the structure is not one that was written by this program.
    """
    plain = dict(settings)
    stated = plain.pop(KEY, None)
    model_type = plain.get("model_type")
    if stated is None:
        if isinstance(model_type, str) and model_type.startswith(PREFIX):
            raise _invalid(f"model_type is {model_type}, and {KEY} is missing")
        return plain, None
    try:
        structure = ModelStructure.model_validate_json(json.dumps(stated))  # strict, but a list is a tuple
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _invalid(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if model_type not in (structure.type_without, PREFIX + structure.type_without):
        raise _invalid(f"it is of a {structure.type_without}, model_type is {str(model_type)[:80]}")
    return {**plain, "model_type": structure.type_without}, structure


def plain_type(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under the model's own type, for a folder whose config no loader of weights reads.

    Beside an ONNX file the config serves loaders such as optimum's, which take shapes from the graph.
    """
    structure = split_settings(settings)[1]
    return dict(settings) if structure is None else {**settings, "model_type": structure.type_without}


def with_structure(settings: Mapping[str, Any], structure: ModelStructure) -> dict[str, Any]:
    """The settings of a ``config.json`` that states ``structure``; its type is one that transformers refuses."""
    model_type = PREFIX + structure.type_without
    return {**settings, "model_type": model_type, KEY: structure.model_dump(mode="json")}


def apply_structure(model: nn.Module, structure: ModelStructure) -> None:
    """Give the modules of a model of the plain config the shapes and counts of ``structure``; values are not set.

    Raises:
        InputRefused: E-STRUCTURE-INVALID: it does not fit the model.
    """
    blocks = _blocks_of(model, structure)
    for index, (block, own) in enumerate(zip(blocks, structure.blocks, strict=True)):
        reshape_block(block, own, f"{structure.blocks_name}.{index}")


def reshape_block(block: nn.Module, structure: BlockStructure, name: str) -> None:
    """The same for one block, which errors call ``name``.

    Raises:
        InputRefused: E-STRUCTURE-INVALID: the structure does not fit the block.
    """
    for path in {**structure.linears, **dict.fromkeys(structure.biases)}:
        layer = _submodule(block, path)
        if layer is None or not is_linear(layer):
            raise _invalid(f"{name} has no linear layer {path}")
        before = shape_of(layer)
        shape = structure.linears.get(path, before)
        if any(size > limit for size, limit in zip(shape, before, strict=True)):
            raise _invalid(f"{name}.{path} would grow from {list(before)} to {list(shape)}")
        resize(layer, (shape[0], shape[1]), bias=path in structure.biases or bias_of(layer) is not None)
    for path, count in structure.attributes.items():
        parent, _, attribute = path.rpartition(".")
        module = _submodule(block, parent)
        present = None if module is None else vars(module).get(attribute)
        if attribute not in HEAD_COUNTS or not isinstance(present, int) or count > present:
            raise _invalid(f"{name} has no {path} to lower to {count}")
        setattr(module, attribute, count)


def difference(block: nn.Module, plain: nn.Module) -> BlockStructure:
    """What of ``block`` is not as in ``plain``, a block of the plain config; shapes and counts alone are looked at."""
    shapes, biases = {}, []
    before = dict(linears_of(plain))
    for path, layer in linears_of(block):
        if shape_of(layer) != shape_of(before[path]):
            shapes[path] = list(shape_of(layer))
        if bias_of(layer) is not None and bias_of(before[path]) is None:
            biases.append(path)
    counts = {}
    for path, module in block.named_modules():
        for name in HEAD_COUNTS.keys() & vars(module).keys():
            count = vars(module)[name]
            if isinstance(count, int) and count != vars(plain.get_submodule(path)).get(name):
                counts[f"{path}.{name}" if path else name] = count
    return BlockStructure(linears=shapes, biases=tuple(biases), attributes=dict(sorted(counts.items())))


def _blocks_of(model: nn.Module, structure: ModelStructure) -> nn.ModuleList:
    blocks = _submodule(model, structure.blocks_name)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != len(structure.blocks):
        raise _invalid(f"the model has no {len(structure.blocks)} blocks in {structure.blocks_name[:80]}")
    return blocks


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _invalid(what: str) -> InputRefused:
    return InputRefused(
        "E-STRUCTURE-INVALID",
        f"config.json: {KEY} cannot be used: {what}",
        "fetch the model again, or prune it again with compress run",
    )
