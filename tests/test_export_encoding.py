"""The choice between dense and sparse, by exact bytes."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto
from onnx_samples import pruned_matrix

from exporters.encoding import (
    TensorCensus,
    census_of_mask,
    encoding_bytes,
    plan_encodings,
    summarize,
    take_census,
)
from exporters.manifest import Encoding, TensorRow


def random_census(
    shape: tuple[int, ...], sparsity: float, dtype: int = TensorProto.FLOAT, name: str = "w"
) -> TensorCensus:
    """The census of a weight with zeros at random places."""
    return census_of_mask(name, dtype, np.random.default_rng(0).random(shape) >= sparsity)


def ratio(census: TensorCensus) -> float:
    """Bytes of the sparse encoding in those of the dense one."""
    sizes = encoding_bytes(census, "m.data")
    return sizes["sparse"] / sizes["dense"]


def plan_of(census: TensorCensus, mode: str = "auto", **settings: object) -> Encoding:
    """The encoding of one weight."""
    return plan_encodings([census], mode, location="m.data", **settings)[census.name]  # type: ignore[arg-type]


def test_census_counts_what_is_not_zero() -> None:
    """Negative zero is zero, NaN is not, and indices below 128 take one byte, the others two."""
    values = np.zeros((2, 128), np.float32)
    values[0, 3], values[0, 4], values[1, 0], values[1, 7] = 1.0, -0.0, np.nan, -2.0
    census = take_census("w", TensorProto.FLOAT, values)
    assert (census.nnz, census.index_bytes) == (3, 1 + 2 + 2)


def test_census_digest_tells_patterns_apart() -> None:
    """The same zeros give the same digest whatever the values, other zeros another, no zeros none."""
    values = pruned_matrix((8, 8), 0.5)
    same = take_census("w", TensorProto.FLOAT16, (values * 3).astype(np.float16))
    assert take_census("w", TensorProto.FLOAT, values).mask_sha256 == same.mask_sha256
    assert take_census("w", TensorProto.FLOAT, values.T).mask_sha256 != same.mask_sha256
    assert take_census("w", TensorProto.FLOAT, np.ones((8, 8), np.float32)).mask_sha256 is None


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
@pytest.mark.parametrize(("dtype", "width"), [(TensorProto.FLOAT, 4), (TensorProto.FLOAT16, 2)])
def test_sparse_bytes_of_a_large_matrix(dtype: int, width: int, sparsity: float) -> None:
    """In a 4096 x 4096 matrix seven in eight indices take 4 bytes, the others 3: width + 3.875 a value."""
    expected = (1 - sparsity) * (width + 3.875) / width
    # The zeros are drawn: their share varies by 1e-4, and the bytes with it.
    assert ratio(random_census((4096, 4096), sparsity, dtype)) == pytest.approx(expected, abs=1e-3)


def test_seventy_per_cent_float32_is_at_most_062() -> None:
    """A float32 matrix with 70 % zeros is stored sparse in at most 0.62 of its dense bytes."""
    census = random_census((4096, 4096), 0.7)
    assert plan_of(census) == "sparse"
    assert ratio(census) <= 0.62


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.55, 0.6, 0.8, 0.99])
@pytest.mark.parametrize(
    "dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8]
)
@pytest.mark.parametrize("shape", [(3, 3), (16, 24), (256, 300)])
def test_auto_takes_sparse_exactly_when_it_saves_a_tenth(
    shape: tuple[int, int], dtype: int, sparsity: float
) -> None:
    """Automatic choice is sparse if and only if that needs at most 0.9 of the dense bytes, so never more."""
    census = random_census(shape, sparsity, dtype)
    saves = "sparse" in encoding_bytes(census, "m.data") and ratio(census) <= 0.9
    assert plan_of(census) == ("sparse" if saves else "dense")


def test_bitmask_bytes_are_one_bit_a_weight_and_the_values() -> None:
    """The packed form counts ceil(size / 8) bytes of mask, the values, and the header that dense has."""
    sizes = encoding_bytes(random_census((33, 5), 0.5, TensorProto.FLOAT16), "m.data")
    nnz = random_census((33, 5), 0.5).nnz
    assert sizes["bitmask"] - (sizes["dense"] - 33 * 5 * 2) == 21 + 2 * nnz


def test_dense_mode_is_dense() -> None:
    """Forced dense takes no sparse initializer, whatever it saves."""
    assert plan_of(random_census((64, 64), 0.95), "dense") == "dense"


def test_sparse_mode_takes_larger_encodings_of_pruned_weights_only() -> None:
    """Forced sparse also takes what is larger than dense, but leaves weights alone that were not pruned."""
    census = random_census((64, 64), 0.1)
    assert ratio(census) > 1
    assert plan_of(census, "sparse") == "sparse"
    assert plan_of(census, "sparse", pruned={"w"}) == "sparse"
    assert plan_of(census, "sparse", pruned={"another"}) == "dense"


@pytest.mark.parametrize(
    "census",
    [
        TensorCensus("too large expanded", (40_000, 40_000), TensorProto.FLOAT, 1000, 4000, "0" * 64),
        TensorCensus("type that is not measured", (64, 64), TensorProto.INT64, 10, 20, "0" * 64),
        TensorCensus("vector", (4096,), TensorProto.FLOAT, 10, 20, "0" * 64),
        TensorCensus("nothing but zeros", (64, 64), TensorProto.FLOAT, 0, 0, "0" * 64),
        TensorCensus("no zeros", (64, 64), TensorProto.FLOAT, 4096, 8000, None),
    ],
    ids=lambda census: census.name,
)
@pytest.mark.parametrize("mode", ["auto", "sparse"])
def test_sparse_is_never_taken_where_it_is_not_legal(census: TensorCensus, mode: str) -> None:
    """What a sparse initializer cannot hold stays dense, also when forced, and has no sparse bytes."""
    assert plan_of(census, mode) == "dense"
    assert "sparse" not in encoding_bytes(census, "m.data")


@pytest.mark.parametrize("mode", ["auto", "sparse"])
def test_inline_budget_goes_to_those_that_save_most(mode: str) -> None:
    """Where the indices of all do not fit into the model file, the sparser weights get the room."""
    shares = {"w50": 0.6, "w90": 0.9, "w70": 0.7, "w80": 0.8}
    censuses = [random_census((128, 128), share, name=name) for name, share in shares.items()]
    sizes = {census.name: census.index_bytes for census in censuses}
    budget = sizes["w90"] + sizes["w80"] + 10
    plan = plan_encodings(censuses, mode, location="m.data", inline_budget=budget)  # type: ignore[arg-type]
    assert {name for name, encoding in plan.items() if encoding == "sparse"} == {"w90", "w80"}


def test_summary_adds_up_and_tells_the_cost_of_loading() -> None:
    """Totals are sums over the rows, and a model with sparse weights says that it loads more slowly."""
    rows = [
        row_of("a", "sparse", {"dense": 100, "sparse": 40, "bitmask": 30}),
        row_of("b", "dense", {"dense": 50, "bitmask": 20}),
    ]
    summary = summarize(rows)
    assert summary.tensors == {"dense": 1, "sparse": 1}
    assert summary.stored_bytes == {"dense": 50, "sparse": 40}
    assert summary.bytes_by_encoding == {"dense": 150, "sparse": 90, "bitmask": 50}
    assert "expands them at load" in summary.load_note
    assert "expands" not in summarize(rows[1:]).load_note


def row_of(name: str, encoding: Encoding, sizes: dict[str, int]) -> TensorRow:
    """A row with the given sizes."""
    return TensorRow(name, (2, 2), "float32", False, -1, True, 2, encoding, None, sizes, sizes[encoding])
