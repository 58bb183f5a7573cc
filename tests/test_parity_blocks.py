"""Parity with one block of the ONNX model in memory at a time says what parity of the whole model says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_validate_export
from exported_models import exported
from onnx_samples import weight_of, write_product
from test_validate_export import request_of_export  # noqa: F401  # a fixture

from exporters.file_graph import graph_of_file
from exporters.read import read_model
from exporters.wire import write_model
from validators import room
from validators.causal_lm import CausalLM
from validators.checks import ValidationReport
from validators.errors import ValidationUsageError
from validators.examine import examine
from validators.parity import left_padded
from validators.request import TaskRequest, ValidationRequest
from validators.session import Session
from validators.streamed import StreamedLM, StreamedWindows
from validators.validate import check_request

IDS = np.random.default_rng(3).integers(3, 100, size=(3, 20))


def both(folder: Path, variant: str, encoding: str) -> tuple[CausalLM, StreamedLM]:
    """A variant's export, loaded whole and block by block."""
    graph, path = exported(variant).graph, folder / "m.onnx"
    write_model(graph.proto, graph.weights, path, "m.onnx.data", encoding=encoding)  # type: ignore[arg-type]
    parts = graph_of_file(read_model(path), graph.block_outputs)
    assert parts is not None
    return CausalLM(Session(path, "cpu")), StreamedLM(path, parts, "cpu")


@pytest.mark.parametrize("variant", ["llama", "bloom"])
def test_blocks_give_the_logits_of_the_whole(variant: str, tmp_path: Path) -> None:
    """At once, over the cache, and padded on the left: only the order of sums may differ."""
    whole, blocks = both(tmp_path, variant, "dense")
    padded = left_padded(IDS)
    for ids, mask, prefix in (
        (IDS, None, None),
        (IDS[:1], None, 10),
        (padded.ids, padded.attention_mask, 16),
    ):
        expected, found = (model.run(ids, mask, ["logits"], prefix)["logits"] for model in (whole, blocks))
        rows = np.ones(ids.shape, bool) if mask is None else mask != 0
        np.testing.assert_allclose(found[rows], expected[rows], rtol=1e-5, atol=1e-5)
    assert bool(whole.cache) == blocks.cache
    assert whole.has_attention_mask == blocks.has_attention_mask
    assert whole.compute_dtype("float32") == blocks.compute_dtype("float32")


def test_windows_that_do_not_go_together_give_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three windows, two of them at a time through the blocks; asked for one after the other."""
    whole, blocks = both(tmp_path, "llama", "dense")
    monkeypatch.setattr("validators.streamed._HIDDEN_BYTES", 2 * 20 * 32 * 4)
    assert blocks.windows_at_once(20) == 2
    streamed = StreamedWindows(blocks, IDS)
    for ids in IDS:
        np.testing.assert_allclose(streamed.logits(ids[None]), whole.logits(ids[None]), rtol=1e-5, atol=1e-5)


def figures(report: ValidationReport) -> dict[str, tuple[str, Any]]:
    """Status and measured value of every check."""
    return {check.name: (check.status, check.measured) for check in report.checks}


def test_both_ways_judge_a_sparse_export_alike(request_of_export: ValidationRequest) -> None:  # noqa: F811
    """The same checks pass, with the same figures to rounding, perplexity included; only one loads the whole."""
    whole, blocks = (
        examine(dataclasses.replace(request_of_export, parity=way)) for way in ("whole", "blocks")
    )
    assert whole.passed
    assert blocks.passed
    assert figures(whole).keys() == figures(blocks).keys()
    for name, (status, measured) in figures(whole).items():
        assert figures(blocks)[name][0] == status, name
        assert figures(blocks)[name][1] == (None if measured is None else pytest.approx(measured, abs=1e-5))
    assert blocks.perplexity["onnx"] == pytest.approx(whole.perplexity["onnx"], rel=1e-6)
    assert (blocks.provider, blocks.compute_dtype) == (whole.provider, whole.compute_dtype)
    assert "load_s" in whole.timings
    assert "load_s" not in blocks.timings


def test_blocks_name_the_block_that_differs(request_of_export: ValidationRequest) -> None:  # noqa: F811
    """A reference with another second block: the same checks fail, and the same line names the block."""
    other = dataclasses.replace(
        request_of_export, reference_factory="test_validate_export:make_altered_reference"
    )
    whole, blocks = (examine(dataclasses.replace(other, parity=way)) for way in ("whole", "blocks"))
    assert {c.name for c in blocks.failed_checks} == {c.name for c in whole.failed_checks}
    assert blocks.first_divergence is not None
    assert blocks.first_divergence.startswith("block 1: max |Δ|")
    assert "behind model.layers.1; block 0 within" in blocks.first_divergence
    assert (
        blocks.first_divergence.partition(" behind ")[0]
        == (whole.first_divergence or "").partition(" behind ")[0]
    )


@pytest.mark.parametrize(("free_bytes", "blocks"), [(2**40, False), (1000, True)])
def test_blocks_are_taken_where_the_whole_does_not_fit(
    request_of_export: ValidationRequest,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    free_bytes: int,
    blocks: bool,
) -> None:
    """auto compares the expanded weights with free memory, and says when it takes blocks."""
    monkeypatch.setattr(room, "available_memory_bytes", lambda: free_bytes)
    report = examine(request_of_export)
    assert report.passed
    assert any("parity block by block" in notice for notice in report.notices) == blocks
    assert ("load_s" in report.timings) != blocks


def test_a_limit_of_the_request_counts_as_free_memory(request_of_export: ValidationRequest) -> None:  # noqa: F811
    """The parent stops the child at that size, so the child takes blocks before."""
    report = examine(dataclasses.replace(request_of_export, memory_limit_bytes=1000))
    assert any("parity block by block" in notice for notice in report.notices)


def test_blocks_need_names_of_block_outputs(request_of_export: ValidationRequest) -> None:  # noqa: F811
    """Without a manifest nobody knows where blocks are: asked for it is an error, auto runs the whole."""
    bare = dataclasses.replace(request_of_export, manifest_path=None, gates=test_validate_export.Gates())
    with pytest.raises(ValidationUsageError, match="no manifest") as caught:
        examine(dataclasses.replace(bare, parity="blocks"))
    assert caught.value.error_id == "E-PARITY-BLOCKS"
    assert "load_s" in examine(dataclasses.replace(bare, memory_limit_bytes=1000)).timings


def test_requests_that_make_no_sense_are_refused(request_of_export: ValidationRequest) -> None:  # noqa: F811
    """A way that there is not, and tasks, which would read the model a thousand times."""
    with pytest.raises(ValidationUsageError, match="got 'half'") as caught:
        check_request(dataclasses.replace(request_of_export, parity="half"))
    assert caught.value.error_id == "E-PARITY-WAY"
    tasks = TaskRequest(("piqa",), "a:b", {}, 64)
    with pytest.raises(ValidationUsageError, match="tasks run the whole model") as caught:
        check_request(dataclasses.replace(request_of_export, parity="blocks", tasks=tasks))
    assert caught.value.error_id == "E-PARITY-TASKS"


@pytest.mark.parametrize(("encoding", "factor"), [("dense", 1.3), ("sparse", 2.2)])
def test_memory_of_the_whole_counts_what_loading_adds(tmp_path: Path, encoding: str, factor: float) -> None:
    """Expanded weights, and for sparse ones the indices that lie beside them meanwhile."""
    values = np.zeros((64, 64), np.float32)
    values[::2] = 1
    path, _ = write_product(tmp_path, [weight_of("w", values)], encoding=encoding)  # type: ignore[arg-type]
    (weight,) = [tensor for tensor in read_model(path).tensors if tensor.name == "w"]
    assert weight.encoding == encoding
    assert room.loaded_bytes([weight]) == int(factor * 64 * 64 * 4)
