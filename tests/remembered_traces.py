"""Traces of tiny models, made once: torch.export and the ONNX exporter take most of a test's time.

A trace has shapes and names of weights, no values. So models of one class, with equal configs, modules and shapes
have equal ones, whatever was pruned, and what follows (stitching, weights, encoding, validation) is done each time.
Processes that test side by side share them through a folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from exporters import trace

_OF_THE_FOLDER = ("_name_or_path", "architectures", "transformers_version")
Traced = Callable[..., ir.Model]
SHARED_FOLDER = "BLOCKPRESS_TEST_TRACES"  # set where several processes test side by side (conftest.py)


def remember_traces() -> None:
    """Let later exports of this process take the trace of an earlier one of such a model."""
    if not hasattr(trace._traced, "__wrapped__"):
        trace._traced = _remembering(trace._traced)


def _remembering(traced: Traced) -> Traced:
    made: dict[Any, ir.Model] = {}

    @functools.wraps(traced)
    def remembered(parts: Any, templates: Any, inputs: Any, axes: Any, opset: int) -> ir.Model:
        key = _what_decides(parts, templates, inputs, opset)
        if key not in made:
            made[key] = _shared_trace(key, lambda: traced(parts, templates, inputs, axes, opset))
        return made[key].clone()  # what follows works in it

    return remembered


def _shared_trace(key: Any, trace: Callable[[], ir.Model]) -> ir.Model:
    """The trace that another process has left, or a new one, which is then left there."""
    folder = os.environ.get(SHARED_FOLDER)
    if folder is None:
        return trace()
    path = Path(folder) / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.onnx"
    if path.is_file():
        return ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
    model = trace()
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(ir.to_proto(model).SerializeToString())
    unfinished.replace(path)
    return model


def _what_decides(parts: Any, templates: Any, inputs: Any, opset: int) -> Any:
    """All that a trace depends on."""
    model = parts.model
    config = {key: value for key, value in model.config.to_dict().items() if key not in _OF_THE_FOLDER}
    leaves, structure = pytree.tree_flatten(inputs)
    return (
        type(model),
        model.config._attn_implementation,
        getattr(model.config, "_experts_implementation", None),
        json.dumps(config, sort_keys=True, default=str),
        str(model),
        str(structure),
        tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, torch.Tensor)),
        tuple((template.source, template.members) for template in templates),
        opset,
    )
