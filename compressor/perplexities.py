"""Perplexity of the dense, the pruned and the recovered model out of one pass over the blocks.

Evaluation windows are pushed through each version of a block while it exists, so that no second whole model is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from compressor.models.source import BlockSource
from compressor.propagation import advance, embedded
from compressor.streams import Activations
from validators.perplexity import perplexity, sum_nll

Version = Literal["dense", "pruned", "recovered", "quantized"]


class EvaluationStreams(Protocol):
    """Evaluation windows on their way through versions of the model."""

    @property
    def streams(self) -> Mapping[str, Activations]:
        """Hidden states by name, where the windows are now."""
        ...

    def advance(self, version: Version, index: int, block: nn.Module) -> None:
        """Push one version's windows through its version of block ``index``; nothing if it is not measured."""
        ...

    def perplexities(self) -> dict[str, float]:
        """Perplexity by version; call it after the last block."""
        ...


class PerplexityStreams:
    """Evaluation windows on their way through versions of the model.

    Args:
        source: Where embedding and head come from.
        ids: Evaluation windows (N, T).
        device: Where blocks compute.
        versions: Which versions are measured.
        known: Perplexity of those among them that were measured before on these windows.
    """

    def __init__(
        self,
        source: BlockSource,
        ids: Tensor,
        device: torch.device,
        versions: Sequence[Version],
        known: Mapping[str, float] | None = None,
    ) -> None:
        self._source = source
        self._ids = ids
        self._known: dict[str, float] = dict(known or {})
        measured = [version for version in versions if version not in self._known]
        self._streams: dict[str, Activations] = {}
        if measured:
            first = embedded(source, ids, device)
            self._streams = {
                version: first if place == 0 else Activations.filled(first.states, device=device)
                for place, version in enumerate(measured)
            }

    @property
    def streams(self) -> Mapping[str, Activations]:
        """Hidden states of each version that is measured."""
        return self._streams

    def advance(self, version: Version, index: int, block: nn.Module) -> None:
        """Push one version's windows through its version of block ``index``; nothing if it is not measured."""
        if version in self._streams:
            advance(self._source, index, block, self._streams[version])

    def perplexities(self) -> dict[str, float]:
        """Perplexity of each version; call it after the last block."""
        found = dict(self._known)
        for version, states in self._streams.items():
            found[version] = self._perplexity(states)
        return found

    def _perplexity(self, states: Activations) -> float:
        total = torch.zeros((), dtype=torch.float64)
        windows, seqlen, _ = states.shape
        with torch.no_grad():
            # One window at a time: logits are vocabulary times larger than hidden states are wide.
            for row in range(windows):
                logits = self._source.head(states.read([row]))
                total += sum_nll(logits, self._ids[row : row + 1]).sum().cpu()
        return perplexity(total, windows * (seqlen - 1))
