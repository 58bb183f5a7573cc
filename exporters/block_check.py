"""Every block of an exported graph compared with PyTorch in ONNX Runtime, as it stands in the graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.block_cache import BlockCache
from exporters.block_cut import HIDDEN, OUTPUTS, PAST_KEY, PAST_VALUE, BlockCut, BlockCutter
from exporters.causal_lm import BlockGraph
from exporters.errors import ExportError
from exporters.example import ExampleSizes, example_tokens
from exporters.parts import ModelParts
from exporters.probe import capture

__all__ = ["TOLERANCES", "BlockCheck", "check_blocks"]

_Array = NDArray[np.generic]
_LOG_ERRORS_ONLY = 3

# Both sides compute in the same dtype and differ in the order of their sums: some hundred roundings, each of
# which is 6e-8 of the value in float32 and 5e-4 in float16.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}


@dataclass(frozen=True)
class BlockCheck:
    """What the comparison found.

    Attributes:
        errors: Per block the largest absolute difference of its hidden state, keys and values, each relative
            to the largest magnitude of the same in PyTorch where that exceeds 1.
        tolerance: What each error had to stay within.
        sessions: How many different graphs the blocks have.
        elapsed_s: Seconds that the check took.
    """

    errors: tuple[float, ...]
    tolerance: float
    sessions: int
    elapsed_s: float


def check_blocks(
    parts: ModelParts,
    graph: BlockGraph,
    *,
    tolerance: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BlockCheck:
    """Run each block alone in ONNX Runtime and in PyTorch on the same hidden state, mask and past, and compare.

    A block's nodes are cut out of the graph with the part of the prologue that they need, and its weights are
    fed as they will be written. Blocks whose nodes are the same but for names share a session.

    Args:
        tolerance: Instead of the one for the dtype that the graph computes in.
        progress: Called with (blocks checked, blocks).

    Raises:
        ExportError: E-EXPORT-BLOCK-MISMATCH naming the first block that differs; E-ORT-MISSING.
    """
    start = time.perf_counter()
    sizes = ExampleSizes()
    tokens = example_tokens(parts.model, sizes)
    inputs: dict[str, Any] = {**tokens, "past_key_values": BlockCache(sizes.past)}
    captured = capture(parts.model, inputs, parts.blocks)
    limit = TOLERANCES[captured.hidden.dtype] if tolerance is None else tolerance
    cutter, sessions = BlockCutter(graph), _Sessions()
    hidden, errors = captured.hidden, []
    for index, call in enumerate(captured.calls):
        cache = BlockCache(sizes.past, seed=index)
        with parts.block(index) as block, torch.no_grad():
            left = call.run(block, hidden, cache)
        past, present = _both(cache.past), _both(cache.present)
        feeds = {HIDDEN: hidden, PAST_KEY: past[0], PAST_VALUE: past[1], **tokens}
        # The prologue reads the length of the past from the first block's keys.
        feeds["past_key_values.0.key"] = past[0]
        outputs = sessions.run(cutter.cut(index), {name: t.numpy() for name, t in feeds.items()})
        errors.append(max(map(_difference, outputs, (left, *present))))
        if not errors[-1] <= limit:
            raise _mismatch(graph.block_names[index], errors[-1], limit)
        hidden = left
        if progress is not None:
            progress(index + 1, len(captured.calls))
    return BlockCheck(tuple(errors), limit, len(sessions), time.perf_counter() - start)


class _Sessions:
    """One ONNX Runtime session per different graph."""

    def __init__(self) -> None:
        self._by_graph: dict[bytes, Any] = {}

    def __len__(self) -> int:
        return len(self._by_graph)

    def run(self, cut: BlockCut, feeds: Mapping[str, _Array]) -> list[_Array]:
        """Return `OUTPUTS` for these inputs and the block's weights; feeds that the graph lacks are left out."""
        graph = cut.proto.SerializeToString(deterministic=True)
        if graph not in self._by_graph:
            self._by_graph[graph] = _session(graph)
        session = self._by_graph[graph]
        given = dict(feeds)
        given.update({name: _fed(weight.load()) for name, weight in cut.weights.items()})
        needed = {port.name for port in session.get_inputs()}
        outputs: list[_Array] = session.run(list(OUTPUTS), {n: a for n, a in given.items() if n in needed})
        return outputs


def _session(graph: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "E-ORT-MISSING",
            "the exported blocks cannot be compared with PyTorch without ONNX Runtime",
            "Install it with the extra: pip install 'blockpress[cpu]' or 'blockpress[gpu]'.",
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _fed(array: _Array) -> _Array:
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def _both(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if pair is None:
        raise RuntimeError("the block did not use its key-value cache")
    return pair


def _difference(found: _Array, expected: Tensor) -> float:
    wanted = expected.double().numpy()
    scale = max(1.0, float(np.abs(wanted).max()))
    return float(np.abs(found.astype(np.float64) - wanted).max()) / scale


def _mismatch(block: str, error: float, limit: float) -> ExportError:
    return ExportError(
        "E-EXPORT-BLOCK-MISMATCH",
        f"{block} differs from PyTorch by {error:.2e} in ONNX Runtime, {limit:.0e} is allowed",
        "Report this with the model's config.json; --opset may avoid it.",
    )
