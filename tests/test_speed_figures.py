"""What follows from measured seconds: medians, ratios, the roof, and the text of tables and page."""

from __future__ import annotations

import json

import pytest
from speed_samples import measured

from compressor.speed.page import render_page
from compressor.speed.table import tables_of
from validators.speed.bandwidth import Reader
from validators.speed.figures import Figure, figure, ratio, turn_order
from validators.speed.resident import resident_of
from validators.speed.results import decode_rate, prefill_rate

MACHINE = {
    "processor": "<b>Some</b> processor",
    "cores": 2,
    "features": ["avx2"],
    "largest_cache_bytes": 2**25,
    "memory_bytes": 2**34,
    "load_average": 0.1,
    "versions": {"blockpress": "0.1.0"},
}
SMAPS = """7f0-7f1 r--s 00000000 08:01 12   /models/a model.onnx.data
Size:               1024 kB
Rss:                 512 kB
7f1-7f2 r-xp 00000000 08:01 13   /lib/libc.so
Rss:                 100 kB
7f2-7f3 rw-p 00000000 00:00 0
Rss:                  50 kB
7f3-7f4 r--s 00100000 08:01 12   /models/a model.onnx.data
Rss:                   8 kB
"""


def test_figure_is_median_and_quartiles() -> None:
    """The quartiles lie on the line between the two values beside them; one slow round moves the median little."""
    assert figure([1.0, 2.0, 3.0, 4.0, 100.0]) == Figure(3.0, 2.0, 4.0, 5)
    assert figure([1.0, 2.0]) == Figure(1.5, 1.25, 1.75, 2)
    assert figure([4.0, 2.0, 3.0]).spread == pytest.approx(1 / 3)


def test_ratio_is_taken_within_rounds() -> None:
    """What slows both models in a round does not show, though the quotient of the medians would be another."""
    assert ratio([2.0, 20.0, 9.0], [1.0, 10.0, 3.0]).median == 2.0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_turn_order_gives_every_model_every_place(count: int) -> None:
    """Each round has every model once; over enough rounds each comes equally often at each place."""
    orders = [turn_order(count, turn) for turn in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert all(sorted(places) == sorted(2 * list(range(count))) for places in zip(*orders, strict=True))


def test_mapped_pages_are_those_of_the_files_named() -> None:
    """Every mapping of the file counts, a library's and the heap's do not; a name may hold a space."""
    assert resident_of(SMAPS.splitlines(keepends=True), {"/models/a model.onnx.data"}) == 520 * 1024
    assert resident_of(SMAPS.splitlines(keepends=True), {"/models/another.data"}) == 0


def test_bandwidth_is_that_of_the_whole_buffer() -> None:
    """Any number of threads reads a buffer that they do not divide evenly."""
    assert all(Reader(threads, size_bytes=1_000_003).read() > 0 for threads in (1, 3))


def test_speed_of_fixed_seconds() -> None:
    """Tokens of the whole batch over the median step, and prompt tokens over the median prefill."""
    speed = measured()
    sparse, dense = speed.models
    assert decode_rate(sparse.at(2)).median == pytest.approx(2 / 0.012)
    assert prefill_rate(sparse.at(2), 100).median == pytest.approx(2 * 100 / 0.5)
    assert speed.decode_ratio(sparse, "dense-int8", 2) == Figure(2.0, 2.0, 2.0, 3)
    assert speed.prefill_ratio(sparse, "dense-int8", 2).median == pytest.approx(0.5)
    assert speed.decode_ratio(dense, "dense-int8", 2).median == 1.0


def test_roof_is_bytes_of_a_step_over_bandwidth() -> None:
    """64 MiB in 12 ms are 5.2 GiB/s of the 10 GiB/s that the machine reads; a batch reads them once."""
    speed = measured()
    assert speed.models[0].bytes_per_s(2) == pytest.approx(64 * 2**20 / 0.012)
    assert speed.share_of_bandwidth(speed.models[0], 2) == pytest.approx(0.0625 / 0.012 / 10)


def test_json_names_what_was_promised() -> None:
    """A model's own figures are those of the first batch size; ratios are against every other baseline."""
    document = json.loads(json.dumps(measured().tree()))
    sparse, dense = document["models"]
    assert sparse["name"] == "sparse-int8"
    assert sparse["decode_tokens_per_s"] == pytest.approx(2 / 0.012)
    assert sparse["prefill_tokens_per_s"] == pytest.approx(400)
    assert (sparse["load_s"], sparse["file_bytes"]) == (0.6, 64 * 2**20)
    assert (sparse["anonymous_bytes"], sparse["mapped_bytes"]) == (64 * 2**20, 2**20)
    assert sparse["batches"][0]["decode_ratio"]["dense-int8"]["median"] == 2.0
    assert (dense["baseline"], dense["batches"][0]["decode_ratio"]) == (True, {})


def test_tables_have_a_row_per_model() -> None:
    """Decoding, prefill, sizes; a baseline has no ratio to itself."""
    decoding, prefill, sizes = tables_of(measured())
    assert decoding.columns[-1] == "/ dense-int8"
    assert decoding.rows[0][:4] == ("sparse-int8", "167 ± 37", "12 ms", "64.00 MiB")
    assert [row[-1] for row in decoding.rows] == ["2.00×", ""]
    assert decoding.rows[0][5] == "52 %"
    assert prefill.rows[0] == ("sparse-int8", "400 ± 50", "500 ms", "0.50×")
    assert sizes.rows[0][-1] == "not installed"
    assert sizes.rows[1][-1] == "-"


def test_page_is_whole_and_escaped() -> None:
    """Drawings, tables and notices in one file without scripts; names cannot become markup."""
    speed = measured()
    page = render_page(speed, MACHINE)
    assert page == render_page(speed, MACHINE)
    assert page.count("<svg") == 4
    assert "&lt;the machine was busy&gt;" in page
    assert "&lt;b&gt;Some&lt;/b&gt; processor" in page
    assert "<script" not in page
    assert "52 %" in page
