"""Scales of quantised matrices: what rounding keeps, and what the search for steps gains."""

from __future__ import annotations

import pytest
import torch

from compressor.quantization.rounding import round_activations
from compressor.quantization.scales import PieceGram, group_size_of, round_to_nearest, search_scales


def sparse_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Half zeros, the rest normal with a few large values."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    W[torch.rand(W.shape, generator=generator) < 0.02] *= 6
    W[torch.rand(W.shape, generator=generator) < 0.5] = 0
    return W


def inputs_of(columns: int) -> torch.Tensor:
    """Tokens whose columns are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(400, columns, generator=generator) @ mixing * torch.logspace(-1, 1, columns)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [64, 100, 256])
def test_rounding_keeps_zeros_and_range(bits: int, columns: int) -> None:
    """Zeros stay zero, integers stay in range, and no weight moves by more than half a step."""
    W = sparse_matrix(24, columns)
    W[3] = 0
    rounded = round_to_nearest(W, bits, group_size_of(bits))
    size = group_size_of(bits) or columns
    steps = rounded.scales.repeat_interleave(size, dim=1)[:, :columns]
    q = rounded.values / steps
    assert torch.equal(rounded.values[W == 0], torch.zeros(int((W == 0).sum())))
    assert q.round().abs().max() <= 2 ** (bits - 1) - 1
    assert torch.allclose(q, q.round(), atol=1e-4)
    assert ((rounded.values - W).abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_search_changes_outputs_less_than_rounding_to_nearest(bits: int) -> None:
    """On the inputs that it saw, the steps that were searched for change the outputs less; zeros stay."""
    W, X = sparse_matrix(32, 192), inputs_of(192)
    statistic = PieceGram(192)
    statistic.add(X)
    nearest = round_to_nearest(W, bits, group_size_of(bits)).values
    searched = search_scales(W, bits, group_size_of(bits), statistic).values
    errors = [(X @ (values - W).T).square().sum() for values in (nearest, searched)]
    assert errors[1] <= errors[0]
    if bits == 4:
        assert errors[1] < 0.9 * errors[0]
    assert (searched[W == 0] == 0).all()


def test_search_without_tokens_rounds_to_nearest() -> None:
    """A matrix that no token has reached takes the steps that need none."""
    W = sparse_matrix(8, 64)
    searched = search_scales(W, 4, 64, PieceGram(64))
    assert torch.equal(searched.values, round_to_nearest(W, 4, 64).values)


def test_piece_gram_holds_the_diagonal_blocks() -> None:
    """X_gᵀ X_g of each 64 columns, the last ones filled up with zeros."""
    X = inputs_of(100)
    statistic = PieceGram(100)
    statistic.add(X[:150])
    statistic.add(X[150:])
    gram = X.T @ X
    assert torch.allclose(statistic.gram()[0], gram[:64, :64], rtol=1e-4)
    assert torch.allclose(statistic.gram()[1, :36, :36], gram[64:, 64:], rtol=1e-4)
    assert statistic.gram()[1, 36:].abs().max() == 0


def test_activations_are_rounded_row_by_row() -> None:
    """Each row in steps of its own largest magnitude / 127, ties to even; zeros stay; a NaN is not lost."""
    X = torch.tensor([[127.0, 0.5, 1.5, -127.0], [0, 0, 0, 0], [12.7, 0.06, -0.04, 1]])
    assert round_activations(X)[0].tolist() == [127, 0, 2, -127]
    assert round_activations(X)[1].tolist() == [0, 0, 0, 0]
    assert torch.allclose(round_activations(X)[2], torch.tensor([12.7, 0.1, 0, 1.0]))
    X[2, 1] = torch.nan
    assert round_activations(X)[2].isnan().all()
