"""One trace of a model cut open at its blocks: prologue, one block per template, and epilogue in one graph.

The model runs once under the exporter with stand-ins for its blocks. The first block of each template runs on
a hidden state that is an input of its own, and the epilogue on another one, so that the three parts never
mix: what the graph shares between them (masks, rotary tables, sizes) is what every block shares. All weights
are inputs too; so they keep their names, the exporter folds none of them into anonymous constants, and
tracing reads no weight.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from exporters.bfloat16 import widen_bfloat16
from exporters.block_cache import BlockCache
from exporters.cached_attention import attention_functions, join_cached_attention
from exporters.errors import ExportError
from exporters.example import ExampleSizes, example_inputs
from exporters.grouped_query import simplify_grouped_attention
from exporters.key_transpose import simplify_key_transposes
from exporters.masked_softmax import simplify_masked_softmax
from exporters.parts import ModelParts
from exporters.probe import BlockCall, replaced_blocks
from exporters.rms_norm import simplify_rms_norms
from exporters.rotary import simplify_rotary_embeddings
from exporters.template import Template

__all__ = ["TracedBlock", "TracedModel", "trace_model"]

_LOGGER_OF_ABSENT_LIBRARIES = "torch.onnx._internal.exporter._registration"


@dataclass(frozen=True)
class TracedBlock:
    """One template in the traced graph: its inputs, its weights by their name in the block, its outputs."""

    hidden: ir.Value
    key: ir.Value
    value: ir.Value
    weights: Mapping[str, ir.Value]
    hidden_out: ir.Value
    key_out: ir.Value
    value_out: ir.Value


@dataclass(frozen=True)
class TracedModel:
    """The traced graph and the role of each of its inputs and outputs.

    Attributes:
        tokens: ``input_ids``, ``attention_mask`` and, where the model takes them, ``position_ids``.
        past_length: An input (B, 1, past, 1) of which only the length is used.
        blocks: One per template.
        head_hidden: The hidden state that enters the epilogue.
        weights: Weights of prologue and epilogue by their full name.
        embedded: The hidden state that leaves the prologue.
        functions: Those of the operators that are no standard ones.
    """

    graph: ir.Graph
    opset_imports: Mapping[str, int]
    tokens: Mapping[str, ir.Value]
    past_length: ir.Value
    blocks: tuple[TracedBlock, ...]
    head_hidden: ir.Value
    weights: Mapping[str, ir.Value]
    embedded: ir.Value
    logits: ir.Value
    functions: tuple[onnx.FunctionProto, ...] = ()


def trace_model(
    parts: ModelParts,
    templates: Sequence[Template],
    opset: int,
    sizes: ExampleSizes,
    *,
    joined_attention: bool = False,
) -> TracedModel:
    """Return prologue, templates and epilogue as one graph with dynamic batch, length and past.

    Args:
        joined_attention: Whether each block's attention becomes one operator of ours where that can be.

    Raises:
        ExportError: E-EXPORT-TRACE when PyTorch cannot trace the model, E-EXPORT-OPSET when it cannot write
            it at this opset.
    """
    inputs, axes = example_inputs(parts, templates, sizes)
    model = _traced(parts, templates, inputs, axes, opset)
    widen_bfloat16(model.graph)
    simplify_key_transposes(model.graph)
    simplify_grouped_attention(model.graph)
    simplify_masked_softmax(model.graph)
    simplify_rms_norms(model.graph)
    simplify_rotary_embeddings(model.graph)
    if joined_attention:
        join_cached_attention(model.graph)
    return _named_model(model, inputs, len(templates), attention_functions(model.graph, opset))


def _traced(
    parts: ModelParts, templates: Sequence[Template], inputs: dict[str, Any], axes: dict[str, Any], opset: int
) -> ir.Model:
    """The graph as the exporter writes it; its inputs and outputs are known by their order."""
    cut = _CutModel(parts, templates)
    with torch.no_grad(), _quiet():
        try:
            exported = torch.export.export(cut, (), kwargs=inputs, dynamic_shapes=axes, strict=False)
        except Exception as error:  # dozens of classes, from the model's own to the compiler's
            raise ExportError(
                "E-EXPORT-TRACE",
                f"{type(parts.model).__name__} cannot be traced: {_cause(error)}",
                "Export a model of a supported architecture, in a configuration without data-dependent code.",
            ) from error
        try:
            program = torch.onnx.export(exported, opset_version=opset, dynamo=True, verbose=False)
        except Exception as error:  # the converter wraps whatever an operator's conversion raises
            raise ExportError(
                "E-EXPORT-OPSET",
                f"{type(parts.model).__name__} cannot be written at opset {opset}: {_cause(error)}",
                "Use --opset 18, at which every supported architecture works.",
            ) from error
    if program is None or program.model.functions:
        raise RuntimeError("the exporter left functions in the graph")
    return program.model


class _CutModel(nn.Module):
    """Runs the model once with its blocks replaced; returns what leaves each part."""

    def __init__(self, parts: ModelParts, templates: Sequence[Template]) -> None:
        super().__init__()
        # In a tuple the model is no submodule: its parameters come as inputs.
        self._parts = (parts,)
        self._by_source = {template.source: number for number, template in enumerate(templates)}

    def forward(
        self,
        tokens: dict[str, Tensor],
        past_length: Tensor,
        blocks: list[dict[str, Any]],
        head_hidden: Tensor,
        weights: dict[str, Tensor],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        (parts,) = self._parts
        embedded: list[Tensor] = []
        left: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def stand_in(index: int, call: BlockCall) -> Tensor:
            if index == 0:
                embedded.append(call.hidden)
            if index in self._by_source:
                number = self._by_source[index]
                left[number] = _run_block(parts.blocks.modules[index], call, blocks[number])
            return head_hidden

        cache = BlockCache(past_length.shape[2])
        with replaced_blocks(parts.model, parts.blocks, stand_in):
            arguments = {**tokens, "past_key_values": cache, "use_cache": True}
            output = torch.func.functional_call(parts.model, _own(parts.model, weights), (), arguments)
        return embedded[0], [left[number] for number in sorted(left)], output.logits


def _run_block(block: nn.Module, call: BlockCall, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    cache = BlockCache(given["key"].shape[2], (given["key"], given["value"]))
    hidden = call.run(_Functional(block, _own(block, given["weights"])), given["hidden"], cache)
    assert cache.present is not None
    return hidden, *cache.present


class _Functional(nn.Module):
    """A block that takes its parameters from elsewhere."""

    def __init__(self, block: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._block = (block,)
        self._tensors = (tensors,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._block[0], self._tensors[0], args, kwargs)


def _own(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with copies of the buffers, since some models write into theirs as they run."""
    buffers = dict(module.named_buffers())
    return {name: t.clone() if name in buffers else t for name, t in tensors.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep two messages of the exporter to itself; neither is about the model."""
    logger = logging.getLogger(_LOGGER_OF_ABSENT_LIBRARIES)
    level = logger.level
    logger.setLevel(logging.ERROR)  # one warning per operator of torchvision, which is not installed
    try:
        with warnings.catch_warnings():
            # torch.export pickles a tree specification of a class that PyTorch itself has deprecated.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """Return the first line of the innermost error; the outer ones are the exporter's advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _named_model(
    model: ir.Model,
    inputs: dict[str, Any],
    templates: int,
    functions: tuple[onnx.FunctionProto, ...],
) -> TracedModel:
    """Return the graph, its inputs and outputs by role; the exporter keeps their order, not their names."""
    graph = model.graph
    _, structure = pytree.tree_flatten(inputs)
    if len(graph.inputs) != structure.num_leaves or len(graph.outputs) != 2 + 3 * templates:
        raise RuntimeError("the exporter changed the number of inputs or outputs")
    given = pytree.tree_unflatten(list(graph.inputs), structure)
    embedded, *left, logits = graph.outputs
    blocks = tuple(
        TracedBlock(
            hidden=block["hidden"],
            key=block["key"],
            value=block["value"],
            weights=block["weights"],
            hidden_out=left[3 * number],
            key_out=left[3 * number + 1],
            value_out=left[3 * number + 2],
        )
        for number, block in enumerate(given["blocks"])
    )
    return TracedModel(
        graph=graph,
        opset_imports=dict(model.opset_imports),
        tokens=given["tokens"],
        past_length=given["past_length"],
        blocks=blocks,
        head_hidden=given["head_hidden"],
        weights=given["weights"],
        embedded=embedded,
        logits=logits,
        functions=functions,
    )
