"""A causal language model as an ONNX graph with a key-value cache, from one trace of its distinct blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch

from exporters.block_cache import BlockCache
from exporters.errors import ExportError
from exporters.example import ExampleSizes, example_tokens
from exporters.graph_weights import GraphWeight
from exporters.packed_function import DOMAIN, DOMAIN_VERSION
from exporters.parts import LoadedParts, ModelParts
from exporters.probe import capture
from exporters.stitch import stitch
from exporters.template import find_templates
from exporters.trace import trace_model

__all__ = ["BlockGraph", "GraphWeight", "LoadedParts", "ModelParts", "build_graph"]

DEFAULT_OPSET = 18
OPSETS = range(18, 24)


@dataclass(frozen=True)
class BlockGraph:
    """A graph without its weights, and the weights.

    Attributes:
        proto: The graph. Nodes name the weights, no initializer holds them; only small constants are inline.
        weights: What has to be added as initializers, in the order of first use.
        embedded: Name of the hidden state that enters the first block.
        block_names: Path of each block in the model, first to last; its nodes' names begin with it.
        block_outputs: Name of the hidden state that leaves each block.
        timings: Seconds for "probe", "trace" and "stitch".
        templates: How many structurally different blocks there are.
    """

    proto: onnx.ModelProto
    weights: list[GraphWeight]
    embedded: str
    block_names: list[str]
    block_outputs: list[str]
    timings: dict[str, float]
    templates: int


def build_graph(
    parts: ModelParts,
    *,
    opset: int = DEFAULT_OPSET,
    joined_attention: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BlockGraph:
    """Return the graph of a causal language model with dynamic batch, sequence and past lengths.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` where the model takes them, and
    ``past_key_values.N.key|value``; outputs are ``logits`` and ``present.N.key|value``.

    Args:
        opset: 18 works for every supported architecture; from 23 on the graph has Attention nodes.
        joined_attention: Whether each block's attention becomes one operator of ours where that can be; the
            graph has its meaning in standard operators beside it.
        progress: Called with the name of each step as it begins: "probe", "trace", "stitch".

    Raises:
        ExportError: E-EXPORT-OPSET, E-EXPORT-ROPE, E-EXPORT-DTYPE, E-EXPORT-TRACE and others: the model
            cannot be exported.
    """
    _refuse_unsupported(parts, opset)
    sizes = ExampleSizes()
    clock = _Clock(progress)
    clock.begin("probe")
    inputs: dict[str, Any] = example_tokens(parts.model, sizes)
    inputs["past_key_values"] = BlockCache(sizes.past)
    templates = find_templates(parts, capture(parts.model, inputs, parts.blocks), sizes.past)
    clock.begin("trace")
    traced = trace_model(parts, templates, opset, sizes, joined_attention=joined_attention)
    clock.begin("stitch")
    stitched = stitch(parts, templates, traced, opset)
    proto = ir.to_proto(stitched.model)
    if traced.functions:
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
        proto.functions.extend(traced.functions)
    clock.end()
    return BlockGraph(
        proto=proto,
        weights=stitched.weights,
        embedded=stitched.embedded,
        block_names=[parts.blocks.block_name(index) for index in range(len(parts.blocks))],
        block_outputs=stitched.block_outputs,
        timings=clock.timings,
        templates=len(templates),
    )


class _Clock:
    """Times the steps and announces them."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.timings: dict[str, float] = {}
        self._progress = progress
        self._running: tuple[str, float] | None = None

    def begin(self, step: str) -> None:
        self.end()
        self._running = (step, time.perf_counter())
        if self._progress is not None:
            self._progress(step)

    def end(self) -> None:
        if self._running is not None:
            step, start = self._running
            self.timings[step] = time.perf_counter() - start
        self._running = None


def _refuse_unsupported(parts: ModelParts, opset: int) -> None:
    if opset not in OPSETS:
        raise ExportError(
            "E-EXPORT-OPSET",
            f"opset {opset} is not one of {OPSETS.start} to {OPSETS.stop - 1}",
            f"Use --opset {DEFAULT_OPSET}.",
        )
    config: Any = parts.model.config
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {
        str(settings.get("rope_type")) for settings in (rope, *rope.values()) if isinstance(settings, dict)
    }
    if any("dynamic" in kind for kind in kinds):
        raise ExportError(
            "E-EXPORT-ROPE",
            "rope_type dynamic recomputes its frequencies from the input's length, which a graph cannot do",
            "Set rope_parameters in config.json to linear or yarn scaling, or export without scaling.",
        )
    if any(p.dtype == torch.bfloat16 for p in parts.model.parameters()):
        raise ExportError(
            "E-EXPORT-BFLOAT16",
            f"{type(parts.model).__name__} is loaded in bfloat16, for which ONNX Runtime has no CPU kernels",
            "Load it in float32 or float16; the weights can still be stored as bfloat16.",
        )
