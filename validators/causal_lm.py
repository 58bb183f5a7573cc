"""A loaded ONNX file as a causal language model: logits at once, or step by step over its KV cache.

The inputs are those of the ecosystem (optimum, transformers): ``input_ids``, and where the graph declares
them ``attention_mask``, ``position_ids`` and ``past_key_values.N.key|value`` with outputs
``present.N.key|value``. Files of other tools may lack any of the last three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.attention_function import CACHE_ROOM
from validators.errors import ValidationError
from validators.reference import Floats, Ids, position_ids
from validators.session import BoundSession, Port, Session, to_float32

_FLOAT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}
_INT_TYPES = ("tensor(int64)", "tensor(int32)")
_PLAIN_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class CacheSlot:
    """One tensor of the KV cache: where it goes in and where it comes out, one step longer."""

    past: Port  # [batch, kv_heads, past, head_dim]
    present: str


class CausalLM:
    """The language model in a session.

    Attributes:
        session: The loaded file.
        cache: Its KV cache; empty for a graph without one.
        has_attention_mask: Whether the graph can be told of padding.
    """

    def __init__(self, session: Session) -> None:
        """Recognise the graph's inputs and outputs.

        Raises:
            ValidationError: E-VALIDATE-SIGNATURE: an input or output is not a causal language model's.
        """
        self.session = session
        self.cache = _cache_slots(session)
        self.has_attention_mask = "attention_mask" in session.inputs
        self._head_shapes = {slot.past.name: _declared_heads(slot.past) for slot in self.cache}
        _check_signature(session, self.cache)

    def compute_dtype(self, stored_dtype: str | None) -> str:
        """The type that the graph computes in: its cache's; without one, what logits and stored weights suggest.

        bfloat16 weights of a graph with float32 logits are cast to float32 at run time.

        Args:
            stored_dtype: The type that most weight bytes are stored in.
        """
        logits = _FLOAT_TYPES[self.session.outputs["logits"].type]
        if self.cache:
            return _FLOAT_TYPES[self.cache[0].past.type]
        return "float16" if "float16" in (logits, stored_dtype) else logits

    def logits(self, ids: Ids, attention_mask: Ids | None = None) -> Floats:
        """Logits (B, T, V) of whole sequences. ``ids``, ``attention_mask``: (B, T), padded on the left."""
        return self.run(ids, attention_mask, ["logits"])["logits"]

    def run(
        self, ids: Ids, attention_mask: Ids | None, outputs: Sequence[str], prefix: int | None = None
    ) -> dict[str, Floats]:
        """Outputs with a token axis, (B, T, ...) in float32, over whole sequences.

        Args:
            ids: (B, T) int64.
            attention_mask: (B, T) int64, 0 at padding on the left; None: no padding.
            outputs: Names of graph outputs of shape (B, tokens of this call, ...).
            prefix: Tokens of the first call; the rest follow one by one over the cache. None: all at once.

        Raises:
            ValidationError: E-ORT-RUN; E-VALIDATE-OUTPUT-SHAPE: an output has not one row per token.
        """
        if prefix is not None and not self.cache:
            raise ValueError("only a graph with a KV cache can go on after a prefix")
        batch, length = ids.shape
        mask = np.ones_like(ids) if attention_mask is None else attention_mask
        past: dict[str, Any] = {}
        parts: dict[str, list[Floats]] = {name: [] for name in outputs}
        for start, stop in calls_of(length, prefix):
            feeds = self.feeds(ids[:, start:stop], mask[:, :stop])
            values = self._call(feeds, past, outputs, keep_cache=stop < length)
            for name in outputs:
                part = to_float32(values[name])
                if part.shape[:2] != (batch, stop - start):
                    raise _shape_error(self.session, name, part.shape, (batch, stop - start))
                parts[name].append(part)
            past = {slot.past.name: values[slot.present] for slot in self.cache if stop < length}
        return {name: np.concatenate(rows, axis=1) for name, rows in parts.items()}

    @property
    def has_cache_room(self) -> bool:
        """Whether the graph extends a cache with room for more tokens in place: see ``with_room``."""
        return self.session.library and self.session.metadata.get(CACHE_ROOM) == "1"

    def with_room(self, past: dict[str, Any], tokens: int) -> BoundSession:
        """The graph over this cache with room for so many tokens in all, which each run extends in place.

        Its ``run`` takes what ``feeds`` makes, and gives the logits.
        """
        shared = {}
        for slot in self.cache:
            array = past[slot.past.name].numpy()
            roomy = np.zeros((*array.shape[:2], tokens, array.shape[3]), array.dtype)
            roomy[:, :, : array.shape[2]] = array
            shared[slot.past.name] = (slot.present, self.session.value(roomy, slot.past))
        return self.session.bind("logits", shared)

    def step(self, feeds: dict[str, Any], past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """One run of the graph as a server makes it: the logits, not converted, and the cache with these tokens.

        Args:
            feeds: What ``feeds`` has made of the new tokens and the mask over them and the past ones.
            past: The cache that the last step left; empty at the start.
        """
        values = self._call(feeds, past, ["logits"], keep_cache=True)
        return values["logits"], {slot.past.name: values[slot.present] for slot in self.cache}

    def _call(
        self, feeds: dict[str, Any], past: dict[str, Any], outputs: Sequence[str], *, keep_cache: bool
    ) -> dict[str, Any]:
        """One run of the graph."""
        past = past or self._empty_cache(feeds["input_ids"].shape()[0])
        presents = [slot.present for slot in self.cache] if keep_cache else []
        values = self.session.run({**feeds, **past}, [*outputs, *presents])
        for slot in self.cache if keep_cache else ():
            _, heads, _, head_dim = values[slot.present].shape()
            self._head_shapes[slot.past.name] = (heads, head_dim)
        return values

    def feeds(self, ids: Ids, mask: Ids) -> dict[str, Any]:
        """The inputs of a run without the cache. ``ids``: (B, new tokens); ``mask``: (B, past + new tokens)."""
        session = self.session
        plain = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position_ids(mask)[:, -ids.shape[1] :],
        }
        return {
            name: session.value(array, session.inputs[name])
            for name, array in plain.items()
            if name in session.inputs
        }

    def _empty_cache(self, batch: int) -> dict[str, Any]:
        """A KV cache of no tokens.

        Our exports declare heads and head size as symbols. Until a first run has shown them they are taken as
        1, which Concat accepts because it ignores an empty operand.
        """
        empty = {}
        for slot in self.cache:
            heads, head_dim = self._head_shapes[slot.past.name]
            array = np.zeros((batch, heads, 0, head_dim), np.float32)
            empty[slot.past.name] = self.session.value(array, slot.past)
        return empty


def calls_of(length: int, prefix: int | None) -> list[tuple[int, int]]:
    """First and one-past-last token of each call: all at once, or ``prefix`` tokens and the rest one by one."""
    stops = [length] if prefix is None else [prefix, *range(prefix + 1, length + 1)]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _cache_slots(session: Session) -> tuple[CacheSlot, ...]:
    """Past inputs with the present outputs that continue them: by their common ending, such as ``.0.key``."""
    presents = {_ending(name): name for name in session.outputs if name.startswith("present")}
    slots = []
    for name, port in session.inputs.items():
        if not name.startswith("past"):
            continue
        present = presents.get(_ending(name))
        if present is None or len(port.shape) != 4 or port.type not in _FLOAT_TYPES:
            raise _signature_error(session, f"input {name} of type {port.type} and shape {list(port.shape)}")
        slots.append(CacheSlot(port, present))
    return tuple(slots)


def _check_signature(session: Session, cache: Sequence[CacheSlot]) -> None:
    known = {*_PLAIN_INPUTS, *(slot.past.name for slot in cache)}
    for name, port in session.inputs.items():
        if name not in known or (name in _PLAIN_INPUTS and port.type not in _INT_TYPES):
            raise _signature_error(session, f"input {name} of type {port.type}")
    if "input_ids" not in session.inputs:
        raise _signature_error(session, "no input input_ids")
    logits = session.outputs.get("logits")
    if logits is None or logits.type not in _FLOAT_TYPES:
        raise _signature_error(session, "no floating output logits")


def _declared_heads(port: Port) -> tuple[int, int]:
    """Heads and head size as declared, 1 for a symbol."""
    heads, head_dim = (side if isinstance(side, int) else 1 for side in (port.shape[1], port.shape[3]))
    return heads, head_dim


def _ending(name: str) -> str:
    """``.0.key`` of ``past_key_values.0.key`` and of ``present.0.key``."""
    return name[name.find(".") :]


def _signature_error(session: Session, what: str) -> ValidationError:
    return ValidationError(
        "E-VALIDATE-SIGNATURE",
        f"{session.path.name}: not the inputs and outputs of a causal language model: {what}",
        "export it as text-generation-with-past, or judge the file alone with --structure-only",
    )


def _shape_error(
    session: Session, name: str, shape: tuple[int, ...], expected: tuple[int, int]
) -> ValidationError:
    return ValidationError(
        "E-VALIDATE-OUTPUT-SHAPE",
        f"{session.path.name}: {name} has shape {list(shape)}, not {list(expected)} (batch, tokens) first",
        "export it with logits for every token, or judge the file alone with --structure-only",
    )
