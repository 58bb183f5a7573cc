"""Tiny models exported to ONNX and run in ONNX Runtime, for the tests of the exported graph."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from architectures import build
from numpy.typing import NDArray
from torch import Tensor

from exporters.causal_lm import BlockGraph, LoadedParts, build_graph
from exporters.wire import write_model

Past = Mapping[str, NDArray[Any]]


class Exported:
    """A model, its exported graph, and a session that runs it."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        parts: LoadedParts,
        opset: int = 18,
        joined_attention: bool = False,
    ) -> None:
        self.model = model
        self.parts = parts
        self.graph: BlockGraph = build_graph(parts, opset=opset, joined_attention=joined_attention)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_model(self.graph.proto, self.graph.weights, path, "model.onnx.data", encoding="dense")
            onnx.checker.check_model(str(path))
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        self.inputs = {port.name: port for port in self.session.get_inputs()}
        self.outputs = {port.name: port for port in self.session.get_outputs()}

    def run(self, tokens: Mapping[str, Tensor], past: Past) -> tuple[NDArray[Any], Past]:
        """Return logits and the past of the next call."""
        feeds = {name: tensor.numpy() for name, tensor in tokens.items() if name in self.inputs}
        names = list(self.outputs)
        values = self.session.run(names, {**feeds, **past})
        found = dict(zip(names, values, strict=True))
        logits = found.pop("logits")
        return logits, {name.replace("present", "past_key_values"): value for name, value in found.items()}

    def empty_past(self, batch: int) -> Past:
        """Return keys and values of no tokens."""
        with torch.no_grad():
            cache = self.model(input_ids=torch.ones((1, 2), dtype=torch.long), use_cache=True).past_key_values
        dtype = np.float16 if self.inputs["past_key_values.0.key"].type == "tensor(float16)" else np.float32
        past = {}
        for index, layer in enumerate(cache.layers):
            for part, states in (("key", layer.keys), ("value", layer.values)):
                shape = (batch, states.shape[1], 0, states.shape[3])
                past[f"past_key_values.{index}.{part}"] = np.zeros(shape, dtype)
        return past

    def reference(self, tokens: Mapping[str, Tensor]) -> NDArray[Any]:
        """Return PyTorch's logits."""
        given = {name: tensor for name, tensor in tokens.items() if name in self.inputs}
        with torch.no_grad():
            logits: NDArray[Any] = self.model(**given, use_cache=False).logits.float().numpy()
        return logits


@cache
def exported(name: str) -> Exported:
    """Return a variant exported at the default opset, the same object each time."""
    model = build(name)
    return Exported(model, LoadedParts(model))


def padded_tokens(batch: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Return token inputs of which the first and third row are left-padded; `length` exceeds the sliding window."""
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def cut(tokens: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Return the inputs for tokens `start` to `stop`; the mask covers everything up to there."""
    return {name: t[:, :stop] if name == "attention_mask" else t[:, start:stop] for name, t in tokens.items()}


def real_tokens(logits: NDArray[Any], tokens: Mapping[str, Tensor]) -> NDArray[Any]:
    """Return the logits of the tokens that are not padding."""
    kept: NDArray[Any] = logits[tokens["attention_mask"].bool().numpy()].astype(np.float32)
    return kept
