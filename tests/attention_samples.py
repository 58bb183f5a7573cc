"""Attention over a cache: models of one operator, random inputs, and the same in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporters.attention_function import CACHED_ATTENTION, ROTARY_ATTENTION, attention_function
from exporters.packed_function import DOMAIN

Floats = NDArray[np.float32]
Exact = NDArray[np.float64]

_INPUTS = ("q", "k", "v", "past_key", "past_value", "mask")
_TABLES = ("cos", "sin")
_OUTPUTS = ("y", "present_key", "present_value")


@dataclass(frozen=True)
class AttentionCase:
    """Sizes of an attention: B sequences, S new tokens behind P, H query heads of which some share a key head."""

    batch: int = 2
    tokens: int = 1
    past: int = 70
    heads: int = 6
    kv_heads: int = 2
    width: int = 16
    value_width: int = 24
    rotary_width: int = 0

    @property
    def rotates(self) -> bool:
        return self.rotary_width > 0

    @property
    def operator(self) -> str:
        return ROTARY_ATTENTION if self.rotates else CACHED_ATTENTION

    @property
    def scale(self) -> float:
        return float(np.float32(self.width**-0.5))

    def inputs(self, seed: int = 0) -> dict[str, Floats]:
        """Random ones, with a causal mask and some padding on the left of the first sequence."""
        random = np.random.default_rng(seed)
        B, S, total = self.batch, self.tokens, self.past + self.tokens
        shapes: dict[str, tuple[int, ...]] = {
            "q": (B, S, self.heads * self.width),
            "k": (B, S, self.kv_heads, self.width),
            "v": (B, S, self.kv_heads * self.value_width),
            "past_key": (B, self.kv_heads, self.past, self.width),
            "past_value": (B, self.kv_heads, self.past, self.value_width),
        }
        if self.rotates:
            shapes |= dict.fromkeys(_TABLES, (1, 1, S, self.rotary_width))
        given = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        hidden = np.arange(total)[None] > np.arange(self.past, total)[:, None]
        mask = np.where(hidden, np.finfo(np.float32).min, 0).astype(np.float32)
        given["mask"] = np.repeat(mask[None, None], B, axis=0)
        given["mask"][0, :, :, : self.past // 3] = np.finfo(np.float32).min
        return given

    def exact(self, given: dict[str, Floats]) -> dict[str, tuple[Exact, Exact]]:
        """Each output in float64, and how large an error of float32 sums is at most, in parts of 1e-6."""
        q, k, v = (
            np.swapaxes(given[name].reshape(self.batch, self.tokens, count, width), 1, 2).astype(np.float64)
            for name, count, width in (
                ("q", self.heads, self.width),
                ("k", self.kv_heads, self.width),
                ("v", self.kv_heads, self.value_width),
            )
        )
        keys, values = (
            np.concatenate([given[past].astype(np.float64), new], axis=2)
            for past, new in (("past_key", self._rotated(k, given)), ("past_value", v))
        )
        group = self.heads // self.kv_heads
        all_keys, all_values = (np.repeat(array, group, axis=1) for array in (keys, values))
        query = self._rotated(q, given) * self.scale
        scores = query @ np.swapaxes(all_keys, 2, 3) + given["mask"]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        reach = 1 + (np.abs(query) @ np.swapaxes(np.abs(all_keys), 2, 3)).max(axis=-1, keepdims=True)
        y, terms = weights @ all_values, weights @ np.abs(all_values) * reach
        by_token = [
            np.swapaxes(array, 1, 2).reshape(self.batch, self.tokens, self.heads * self.value_width)
            for array in (y, terms)
        ]
        return {
            "y": (by_token[0], by_token[1]),
            "present_key": (keys, np.abs(keys) + 1),
            "present_value": (values, np.abs(values) + 1),
        }

    def _rotated(self, x: Exact, given: dict[str, Floats]) -> Exact:
        R = self.rotary_width
        if not R:
            return x
        first, swapped = x[..., :R], np.concatenate([x[..., R // 2 : R], x[..., : R // 2]], axis=-1)
        return np.concatenate([first * given["cos"] + swapped * given["sin"], x[..., R:]], axis=-1)

    def model(self, **attributes: Any) -> onnx.ModelProto:
        """A model of the operator, with its meaning in standard operators beside it."""
        names = [*_INPUTS, *(_TABLES if self.rotates else ())]
        given = {"num_heads": self.heads, "kv_heads": self.kv_heads, "scale": self.scale} | attributes
        node = helper.make_node(self.operator, names, _OUTPUTS, domain=DOMAIN, **given)
        ports = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in of]
            for of in (names, _OUTPUTS)
        ]
        model = helper.make_model(
            helper.make_graph([node], "attention", *ports),
            opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)],
            ir_version=10,
        )
        widths = {self.rotary_width} if 0 < self.rotary_width < self.width else set()
        rows = self.heads != self.kv_heads
        function = attention_function(self.operator, rows=rows, widths=widths, apart=(), opset=18)
        model.functions.append(function)
        return model
