"""The key-value cache of one block, as its attention sees it, so that a block runs and traces alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

__all__ = ["BlockCache"]


class BlockCache(Cache):  # type: ignore[misc] # the library has no types
    """A cache that holds the past of whichever block asks, and asks nothing about layers.

    Given `past`, a key and a value (B, heads, past, head_dim), new keys and values are joined to it. Given
    only a length, a past of fitting shape is drawn when the block hands over its first keys and values; this
    shows a block's key-value shape without knowing it beforehand.

    Unlike the library's caches it never crops: in sliding layers the mask decides alone, so that the past
    that goes in and the present that comes out have the same layout for all layers.
    """

    def __init__(self, length: int, past: tuple[Tensor, Tensor] | None = None, seed: int = 0) -> None:
        # The parent's constructor would make layers to hold keys and values; here they are attributes.
        self.layers: list[Any] = []
        self.length = length
        self.past = past
        self.present: tuple[Tensor, Tensor] | None = None
        self._seed = seed

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return past and new keys and values joined along the length, and keep them as `present`."""
        if self.past is None:
            generator = torch.Generator().manual_seed(self._seed)
            self.past = (self._drawn(key_states, generator), self._drawn(value_states, generator))
        self.present = (
            torch.cat([self.past[0], key_states], dim=-2),
            torch.cat([self.past[1], value_states], dim=-2),
        )
        return self.present

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the length of the past, which is the same for every layer."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys that the mask covers and the position of the first one."""
        return self.length + query_length, 0

    @property
    def is_compileable(self) -> bool:
        """Whether the mask code may assume static sizes; here it may not."""
        return False

    def _drawn(self, states: Tensor, generator: torch.Generator) -> Tensor:
        shape = (*states.shape[:-2], self.length, states.shape[-1])
        return torch.randn(shape, generator=generator).to(states.device, states.dtype)
