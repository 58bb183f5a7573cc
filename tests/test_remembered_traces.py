"""What the tests take for a trace is what a trace would give."""

from __future__ import annotations

import architectures
import pytest

from exporters import trace
from exporters.causal_lm import LoadedParts, build_graph


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
def test_remembered_trace_is_what_a_trace_gives(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph to the byte, for other weights."""
    build_graph(LoadedParts(architectures.build(variant, seed=1)))
    remembered = build_graph(LoadedParts(architectures.build(variant)))
    monkeypatch.setattr(trace, "_traced", trace._traced.__wrapped__)
    assert build_graph(LoadedParts(architectures.build(variant))).proto == remembered.proto
