"""Numbers as the report prints them."""

from __future__ import annotations

import math

import pytest

from compressor.report import units
from compressor.report.schema import WeightRow
from compressor.report.tables import sparsity_table, weight_rows


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "not measured"),
        (0, "0"),
        (288_627, "288\u202f627"),
        (0.0, "0"),
        (0.00081, "8.1e−4"),
        (12.8417, "12.84"),
        (-0.25, "−0.25"),
        (12345.6, "12346"),
        (2e9, "2e9"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
        ("112/112", "112/112"),
    ],
)
def test_units_number_keeps_four_digits(value: float | str | None, shown: str) -> None:
    """Four significant digits, counts whole, no number by its name."""
    assert units.number(value) == shown


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (None, "not measured"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1_703_442_118, "1.59 GiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_units_bytes_are_binary(size_bytes: int | None, shown: str) -> None:
    """Sizes in KiB to TiB with three or four digits."""
    assert units.byte_size(size_bytes) == shown


@pytest.mark.parametrize(
    ("elapsed_s", "shown"),
    [
        (None, "not measured"),
        (0.424, "0.42 s"),
        (41.04, "41.0 s"),
        (59.97, "60.0 s"),
        (437.3, "7 min 17 s"),
        (11_040.0, "3 h 4 min"),
    ],
)
def test_units_duration_reads_like_a_clock(elapsed_s: float | None, shown: str) -> None:
    """Seconds, minutes and hours, two parts at most."""
    assert units.duration(elapsed_s) == shown


@pytest.mark.parametrize(
    ("value", "reference", "shown"),
    [
        (12.84, 9.76, "+31.6 %"),
        (9.0, 10.0, "−10.0 %"),
        (14_812.0, 9.76, "×1518"),
        (1.0, 0.0, None),
        (math.nan, 1.0, None),
        (None, 1.0, None),
    ],
)
def test_units_change_is_relative(value: float | None, reference: float, shown: str | None) -> None:
    """A percentage with its sign, a factor from tenfold on, nothing where there is no ratio."""
    assert units.change(value, reference) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(31.2, "31.20"), (9.7612, "9.761"), (14_812.3, "14812"), (math.nan, "NaN")]
)
def test_units_perplexity_keeps_trailing_zeros(value: float, shown: str) -> None:
    """Four digits always, so that perplexities line up."""
    assert units.perplexity(value) == shown


def test_tables_label_weights_by_their_shortest_own_name() -> None:
    """Two weights that end alike keep as many parts of their names as tells them apart."""
    names = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_proj.weight")
    rows = [WeightRow(block=0, name=name, shape=(2, 2), sparsity=0.5) for name in names]
    assert list(sparsity_table(rows)) == ["c_attn", "attn.c_proj", "mlp.c_proj"]


def test_tables_sum_bytes_only_when_all_are_known() -> None:
    """One unknown size makes the sum unknown."""
    rows = tuple(
        WeightRow(block=0, name="up_proj", shape=(2, 2), sparsity=0.5, stored_bytes=size, dense_bytes=8)
        for size in (4, None)
    )
    (row,) = weight_rows(rows)
    assert (row["stored_bytes"], row["dense_bytes"], row["matrices"]) == (None, 16, 2)
