"""Input statistics: equal to the formula, mergeable, shared between linears, strict about bad inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.statistics import BlockStatistics, ColumnNorms, Gram, Statistic


def inputs(tokens: int = 50, width: int = 6, seed: int = 0) -> Tensor:
    """Correlated inputs, (tokens, width)."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, width, generator=generator)
    return X @ torch.randn(width, width, generator=generator)


def test_column_norms_equal_the_length_of_each_column() -> None:
    """Norms over batches equal the norm over all tokens (sums of 50 float32 terms: 1e-6 relative)."""
    X = inputs()
    statistic = ColumnNorms(6)
    for batch in X.split(8):
        statistic.add(batch)
    torch.testing.assert_close(statistic.norms, X.norm(dim=0), rtol=1e-6, atol=0)
    assert statistic.tokens == 50


def test_gram_equals_the_outer_products() -> None:
    """The Gram matrix equals the sum over tokens of x x^T (float32 sums in another order: 1e-5 relative)."""
    X = inputs()
    statistic = Gram(6)
    statistic.add(X.view(5, 10, 6))
    expected = sum(torch.outer(x, x) for x in X.double())
    torch.testing.assert_close(statistic.gram().double(), expected, rtol=1e-5, atol=1e-4)
    assert statistic.tokens == 50


@pytest.mark.parametrize("kind", [ColumnNorms, Gram])
def test_statistics_of_disjoint_tokens_merge(kind: type[Statistic]) -> None:
    """Two halves merged equal the whole, bit for bit when they were added in the same order."""
    X = inputs()
    whole, first, second = kind(6), kind(6), kind(6)
    for statistic in (whole, first):
        statistic.add(X[:20])
    for statistic in (whole, second):
        statistic.add(X[20:])
    first.merge(second)
    assert torch.equal(first._sum, whole._sum)
    assert first.tokens == whole.tokens == 50


def test_merge_refuses_another_kind_or_width() -> None:
    """Sums of different things do not add up."""
    with pytest.raises(ValueError, match="cannot merge"):
        Gram(6).merge(ColumnNorms(6))
    with pytest.raises(ValueError, match="cannot merge"):
        Gram(6).merge(Gram(7))


def test_add_refuses_another_width() -> None:
    """Inputs of the wrong width are named instead of broadcast."""
    with pytest.raises(ValueError, match=r"width 6, got \(3, 1\)"):
        ColumnNorms(6).add(torch.ones(3, 1))


def test_low_precision_inputs_are_summed_in_float32() -> None:
    """Float16 inputs of 300 square to 9e4, beyond float16's largest number, and still sum up."""
    statistic = ColumnNorms(1)
    statistic.add(torch.full((4, 1), 300.0, dtype=torch.float16))
    assert statistic.norms.item() == 600.0


def test_non_finite_inputs_are_refused_by_name() -> None:
    """Infinity among the inputs is an error that names the matrix."""
    statistic = ColumnNorms(2)
    statistic.add(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(InputRefused, match=r"block\.mlp\.up") as caught:
        statistic.check_finite("block.mlp.up")
    assert caught.value.error_id == "E-STATISTIC-NONFINITE"


class CountedGram(Gram):
    """A Gram matrix that counts how often it is computed."""

    computed = 0

    @staticmethod
    def of(X: Tensor) -> Tensor:
        CountedGram.computed += 1
        return Gram.of(X)


def test_block_statistics_compute_a_shared_input_once() -> None:
    """q, k and v are fed by one tensor: one product, three equal statistics."""
    CountedGram.computed = 0
    statistics = BlockStatistics(CountedGram, {"q": 6, "k": 6, "v": 6})
    for seed in (0, 1):
        X = inputs(seed=seed)
        for name in "qkv":
            statistics.receive(name, X.view(5, 10, 6) if name == "k" else X)
    assert CountedGram.computed == 2
    alone = Gram(6)
    for seed in (0, 1):
        alone.add(inputs(seed=seed))
    for name in "qkv":
        assert torch.equal(statistics[name]._sum, alone._sum)
        assert statistics[name].tokens == 100


def test_block_statistics_keep_one_sum_for_matrices_with_the_same_inputs() -> None:
    """q and k hold one statistic; v saw one tensor less and o another one, so each has its own."""
    statistics = BlockStatistics(Gram, dict.fromkeys("qkvo", 6))
    first, second, other = (inputs(seed=seed) for seed in range(3))
    for name, X in [("q", first), ("k", first), ("v", first), ("o", other), ("q", second), ("k", second)]:
        statistics.receive(name, X)
    assert statistics["q"] is statistics["k"]
    expected = {"q": [first, second], "v": [first], "o": [other]}
    for name, batches in expected.items():
        alone = Gram(6)
        for X in batches:
            alone.add(X)
        assert torch.equal(statistics[name]._sum, alone._sum)
        assert statistics[name].tokens == 50 * len(batches)


def test_block_statistics_count_a_tensor_as_often_as_it_comes() -> None:
    """A matrix that is used twice on one tensor counts it twice, and the others once."""
    statistics = BlockStatistics(ColumnNorms, dict.fromkeys("abc", 6))
    X = inputs()
    for name in "aabcb":
        statistics.receive(name, X)
    assert [statistics[name].tokens for name in "abc"] == [100, 100, 50]


def test_derived_is_computed_once_until_the_sum_changes() -> None:
    """One computation per key; tokens added, or a sum written to, make it anew."""
    statistic, calls = Gram(6), []

    def trace(G: Tensor) -> float:
        calls.append(len(calls))
        return float(G.trace())

    statistic.add(inputs())
    assert statistic.derived("trace", trace) == statistic.derived("trace", trace)
    assert len(calls) == 1
    statistic.derived("another", trace)
    statistic.add(inputs(seed=1))
    assert statistic.derived("trace", trace) == float(statistic.gram().trace())
    assert len(calls) == 3


def test_block_statistics_keep_what_is_derived_of_one_statistic_at_a_time() -> None:
    """Asking for another matrix' statistic lets go of the factor of the one before."""
    statistics = BlockStatistics(Gram, {"q": 6, "k": 6, "down": 8})
    statistics.receive("q", inputs())
    statistics.receive("k", inputs())
    calls: list[str] = []
    for name in ("q", "q", "down", "q"):
        statistics[name].derived("factor", lambda _, name=name: calls.append(name))
    assert calls == ["q", "down", "q"]


def test_block_statistics_notice_a_tensor_that_was_written_to() -> None:
    """The same memory with new values is another input."""
    statistics = BlockStatistics(ColumnNorms, {"a": 2, "b": 2})
    X = torch.ones(3, 2)
    statistics.receive("a", X)
    X.mul_(2)
    statistics.receive("b", X)
    statistics.finish()
    assert statistics["b"]._sum.tolist() == [12.0, 12.0]


def test_block_statistics_tell_views_of_one_memory_apart() -> None:
    """A transposed view and a shorter view of the same memory are other inputs."""
    statistics = BlockStatistics(ColumnNorms, {"a": 3, "b": 3, "c": 3})
    X = inputs(3, 3)
    for name, view in (("a", X), ("b", X.T), ("c", X[:2])):
        statistics.receive(name, view)
        alone = ColumnNorms(3)
        alone.add(view)
        assert torch.equal(statistics[name]._sum, alone._sum)
        assert statistics[name].tokens == len(view)


def test_a_matrix_without_tokens_counts_none() -> None:
    """An expert that nothing was routed to has zero tokens, also after an empty batch."""
    statistics = BlockStatistics(Gram, {"expert": 4})
    statistics.receive("expert", torch.empty(0, 4))
    assert statistics["expert"].tokens == 0
