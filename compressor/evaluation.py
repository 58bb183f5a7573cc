"""The evaluation text of a run, cut into the windows that every perplexity is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.calibration.text import TextSource, read_text
from compressor.calibration.tokens import refuse_ids_beyond
from compressor.errors import InputRefused
from compressor.recipe import EvaluationRecipe
from compressor.report.schema import PerplexityProtocol
from validators.windows import EvaluationProtocol, evaluation_windows

DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Evaluation:
    """Evaluation windows and where they come from.

    Attributes:
        text: The text, with its hash.
        ids: Windows (N, T) int64.
        protocol: How they were cut.
    """

    text: TextSource
    ids: NDArray[np.int64]
    protocol: EvaluationProtocol

    @property
    def digest(self) -> str:
        """What tells these windows from all others: digest of the ids, and their shape."""
        rows, columns = self.ids.shape
        return f"{self.protocol.sha256[:32]}-{rows}x{columns}"

    def facts(self) -> PerplexityProtocol:
        """What the report says of it."""
        protocol = self.protocol
        return PerplexityProtocol(
            source=self.text.spec,
            sha256=self.text.sha256,
            window=protocol.window_tokens,
            stride=protocol.stride_tokens,
            windows=protocol.windows,
            tokens=protocol.predicted_tokens,
            bos="once, at the start of the text" if protocol.bos else "none",
            join=protocol.join,
            dtype="float32",
            dropped_tokens=protocol.dropped_tail_tokens,
        )


def evaluation_of(recipe: EvaluationRecipe, tokenizer: Any, seqlen: int, vocab_rows: int) -> Evaluation:
    """The windows that ``recipe`` asks for, ``seqlen`` tokens each, for an embedding of ``vocab_rows`` rows.

    Raises:
        ReportedError: The text is absent, empty, not UTF-8, shorter than a window, or has tokens that the model lacks.
    """
    text = read_text(
        recipe.source,
        role="evaluation",
        dataset_config=recipe.dataset_config,
        split=recipe.split,
        text_column=recipe.text_column,
    )
    windows = evaluation_windows(
        text.documents, text.kind, tokenizer, seqlen=seqlen, max_windows=recipe.max_windows
    )
    refuse_ids_beyond([int(windows.ids.max())], vocab_rows)
    return Evaluation(text, windows.ids, windows.protocol)


def window_length(limit: int, asked: int | None = None) -> int:
    """Tokens per window: what was asked for, else 2048, never more than the model's ``limit``.

    A limit of 131072 would ask for documents that no calibration text has, so the default is capped.

    Raises:
        InputRefused: The model has no room for two tokens, of which one is predicted from the other.
    """
    if limit < 2:
        raise InputRefused(
            "E-CONFIG-SIZE",
            f"config.json gives the model positions for {limit} token, a window needs 2",
            "use another checkpoint",
        )
    return min(DEFAULT_WINDOW if asked is None else asked, limit)
