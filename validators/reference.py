"""What parity compares with: any model that gives logits and the output of each decoder block."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class Reference(Protocol):
    """The model that the ONNX file must reproduce, injected by whoever knows how to load it.

    Shapes: B sequences, T tokens, V vocabulary, D hidden size. A sequence shorter than T is padded on the
        left; its attention mask is 0 there, and positions count from its first real token (``position_ids``).
    """

    def logits(self, ids: Ids, attention_mask: Ids | None = None) -> Floats:
        """Logits (B, T, V). ``ids``, ``attention_mask``: (B, T); no mask means no padding."""
        ...

    def block_outputs(self, ids: Ids, attention_mask: Ids | None = None) -> list[Floats]:
        """Hidden states (B, T, D) that leave each decoder block, first block first, before the final norm."""
        ...


def position_ids(attention_mask: Ids) -> Ids:
    """Positions (B, T) as generation makes them: 0 at padding and at the first real token after it."""
    positions: Ids = np.cumsum(attention_mask, axis=-1, dtype=np.int64) - 1
    positions[attention_mask == 0] = 0
    return positions
