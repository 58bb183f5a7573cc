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
