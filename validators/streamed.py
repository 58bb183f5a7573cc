"""The language model of an exported file with one block in memory at a time.

The tokens are known beforehand, so that nothing has to go through all blocks before the next token: each block
takes all sequences, call by call over its own cache, and is let go. What stands before the blocks, each block, and
what stands behind them are models of their own, cut out of the file's graph; their weights are read from the file,
expanded where they are sparse, and fed as inputs. Blocks that differ in nothing but weights share a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from exporters.block_cut import HIDDEN, OUTPUTS, PAST_KEY, PAST_VALUE, BlockCut, BlockCutter
from exporters.file_graph import FileGraph
from validators.causal_lm import calls_of
from validators.reference import Floats, Ids, position_ids
from validators.session import Session, to_float32

__all__ = ["Sequences", "StreamedLM", "StreamedWindows"]

# Hidden states of windows that go through the blocks together; more of them read every block again.
_HIDDEN_BYTES = 2**30
_FLOATS = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
_FIRST_PAST = "past_key_values.0.key"  # from which the graph reads the length of the past


@dataclass(frozen=True)
class Sequences:
    """Sequences of one length, and how they are run; see ``validators.causal_lm.CausalLM.run``.

    Attributes:
        ids: (B, T) int64.
        attention_mask: (B, T) int64, 0 at padding on the left; None: no padding.
        prefix: Tokens of the first call, the rest one by one; None: all at once.
    """

    ids: Ids
    attention_mask: Ids | None = None
    prefix: int | None = None


@dataclass
class _Running:
    """Sequences on their way: the tokens of each call, and the hidden state of each call where they are now."""

    calls: list[dict[str, Ids]]
    hidden: list[Any] = field(default_factory=list)


class StreamedLM:
    """The language model of a file, in the place of a ``CausalLM``.

    Args:
        path: The file, for messages.
        graph: Its graph.
        provider: Execution provider.
    """

    def __init__(self, path: Path, graph: FileGraph, provider: str) -> None:
        self._path, self._graph, self._asked = path, graph, provider
        self._cutter = BlockCutter(graph)
        self._sessions: dict[bytes, Session] = {}
        self._types = {value.name: value.type.tensor_type.elem_type for value in graph.proto.graph.input}
        self.cache = True
        self.has_attention_mask = "attention_mask" in self._types
        self.provider: str | None = None
        self.notices: tuple[str, ...] = ()

    def compute_dtype(self, stored_dtype: str | None) -> str:
        """The type that the graph computes in: its cache's."""
        return _FLOATS[self._types[_FIRST_PAST]]

    def logits(self, ids: Ids, attention_mask: Ids | None = None) -> Floats:
        """Logits (B, T, V) of whole sequences. ``ids``, ``attention_mask``: (B, T), padded on the left."""
        return self.run(ids, attention_mask, ["logits"])["logits"]

    def run(
        self, ids: Ids, attention_mask: Ids | None, outputs: Sequence[str], prefix: int | None = None
    ) -> dict[str, Floats]:
        """``logits`` and block outputs, (B, T, ...) in float32, over whole sequences; as ``CausalLM.run``."""
        found: dict[str, Floats] = {}
        running = self._embedded([Sequences(ids, attention_mask, prefix)])
        for name in self._blocks(running):
            if name in outputs:
                found[name] = _joined(running[0].hidden)
        if "logits" in outputs:
            (found["logits"],) = self._heads(running)
        return {name: found[name] for name in outputs}

    def logits_of(
        self, sequences: Sequence[Sequences], on_block: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Floats]:
        """Logits (B, T, V) of several sequences, for which every block is read once.

        Args:
            sequences: What to run.
            on_block: Called with the blocks done and in all.
        """
        running = self._embedded(sequences)
        for done, _ in enumerate(self._blocks(running), start=1):
            on_block(done, len(self._graph.block_outputs))
        return self._heads(running)

    def states_of(self, windows: Ids) -> list[Any]:
        """What leaves the last block for each of the windows (N, T), to be given to :meth:`head`."""
        running = self._embedded([Sequences(ids[None]) for ids in windows])
        for _ in self._blocks(running):
            pass
        return [one.hidden[0] for one in running]

    def head(self, ids: Ids, state: Any) -> Floats:
        """Logits (1, T, V) of one of the states of :meth:`states_of`, whose tokens are ``ids`` (1, T)."""
        (logits,) = self._heads([_Running(_tokens(Sequences(ids)), [state])])
        return logits

    def windows_at_once(self, seqlen: int) -> int:
        """How many windows of this length go through the blocks together."""
        (one,) = self._embedded([Sequences(np.zeros((1, seqlen), np.int64))])
        return max(1, _HIDDEN_BYTES // max(1, to_float32(one.hidden[0]).nbytes))

    def _embedded(self, sequences: Sequence[Sequences]) -> list[_Running]:
        """All sequences in front of the first block."""
        running = [_Running(_tokens(one)) for one in sequences]
        with _Part(self, self._cutter.cut_prologue()) as part:
            for one in running:
                one.hidden = [
                    part.run({**tokens, _FIRST_PAST: self._past(tokens)}, [self._graph.embedded])[0]
                    for tokens in one.calls
                ]
        return running

    def _blocks(self, running: Sequence[_Running]) -> Iterator[str]:
        """Push the sequences through one block after the other; the name of the block's output behind each."""
        for index, name in enumerate(self._graph.block_outputs):
            with _Part(self, self._cutter.cut(index)) as part:
                for one in running:
                    one.hidden = list(self._through(part, one))
            yield name

    def _through(self, part: _Part, one: _Running) -> Iterator[Any]:
        key = value = self._past(one.calls[0])
        for tokens, hidden in zip(one.calls, one.hidden, strict=True):
            feeds = {**tokens, HIDDEN: hidden, PAST_KEY: key, PAST_VALUE: value, _FIRST_PAST: key}
            again = tokens is not one.calls[-1]
            found = part.run(feeds, OUTPUTS if again else OUTPUTS[:1])
            if again:
                key, value = found[1:]
            yield found[0]

    def _heads(self, running: Sequence[_Running]) -> list[Floats]:
        with _Part(self, self._cutter.cut_epilogue()) as part:
            found = []
            for one in running:
                pairs = zip(one.calls, one.hidden, strict=True)
                feeds = (
                    {**tokens, _FIRST_PAST: self._past(tokens), HIDDEN: hidden} for tokens, hidden in pairs
                )
                found.append(_joined([part.run(each, ["logits"])[0] for each in feeds]))
            return found

    def _past(self, tokens: Mapping[str, Ids]) -> Floats:
        """Keys or values of as many tokens as came before a call; their heads and width are read from nothing."""
        batch, total = tokens["attention_mask"].shape
        return np.zeros((batch, 1, total - tokens["input_ids"].shape[1], 1), np.float32)

    def session(self, cut: BlockCut) -> Session:
        """The session for a part; equal parts share it."""
        graph = cut.proto.SerializeToString(deterministic=True)
        if graph not in self._sessions:
            session = Session(self._path, self._asked, graph=graph)
            self._sessions[graph] = session
            self.provider, self.notices = session.provider, session.notices
        return self._sessions[graph]


class _Part:
    """A part of the graph with its weights, while it is needed."""

    def __init__(self, model: StreamedLM, cut: BlockCut) -> None:
        self._session, self._cut = model.session(cut), cut
        self._weights: dict[str, Any] = {}

    def __enter__(self) -> _Part:
        session = self._session
        for name, weight in self._cut.weights.items():
            if name in session.inputs:
                self._weights[name] = session.value(weight.load(), session.inputs[name])
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.clear()

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """The outputs, as values of ONNX Runtime; arrays among the feeds that the part does not take are left out."""
        session = self._session
        given = {
            name: session.value(fed, session.inputs[name]) if isinstance(fed, np.ndarray) else fed
            for name, fed in feeds.items()
            if name in session.inputs
        }
        values = session.run({**given, **self._weights}, outputs)
        return [values[name] for name in outputs]


class StreamedWindows:
    """Logits of windows that are asked for one after the other, whose hidden states are computed many at a time.

    Args:
        model: The language model.
        windows: (N, T) int64, in the order in which they are asked for.
    """

    def __init__(self, model: StreamedLM, windows: Ids) -> None:
        self._model, self._windows = model, windows
        self._at_once = model.windows_at_once(windows.shape[1])
        self._asked = 0
        self._states: list[Any] = []

    def logits(self, ids: Ids) -> Floats:
        """Logits (1, T, V) of the next window."""
        if not self._states:
            self._states = self._model.states_of(self._windows[self._asked : self._asked + self._at_once])
        self._asked += 1
        return self._model.head(ids, self._states.pop(0))


def _tokens(sequences: Sequences) -> list[dict[str, Ids]]:
    """The token inputs of each call."""
    ids, prefix = sequences.ids, sequences.prefix
    mask = np.ones_like(ids) if sequences.attention_mask is None else sequences.attention_mask
    return [
        {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": position_ids(mask[:, :stop])[:, start:],
        }
        for start, stop in calls_of(ids.shape[1], prefix)
    ]


def _joined(values: Sequence[Any]) -> Floats:
    """The values of all calls along the token axis, float32."""
    return np.concatenate([to_float32(value) for value in values], axis=1)
