"""FLAP's scores: streaming moments, the three metrics, standardisation, and the bias for what goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.moments import Moments
from compressor.pruning.flap import channel_scores, compensation, member_scores, standardised
from compressor.units import UnitGroup

# Sums of a few hundred float32 numbers, whose roundings of 6e-8 add up.
RTOL = 1e-5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments_of(X: Tensor, *sizes: int) -> Moments:
    """The moments of ``X`` added in batches of these sizes."""
    moments = Moments(X.shape[-1])
    for batch in X.split(list(sizes or (len(X),))):
        moments.add(batch)
    return moments


@pytest.mark.parametrize("sizes", [(300,), (1, 299), (100, 1, 150, 49), (1,) * 300])
def test_prune_flap_moments_equal_those_of_all_tokens(sizes: tuple[int, ...]) -> None:
    """Mean and variance do not depend on how the tokens come, the first and single ones included."""
    X = 3 * drawn(300, 7) + torch.arange(7)
    moments = moments_of(X, *sizes)
    torch.testing.assert_close(moments.mean, X.double().mean(0), rtol=RTOL, atol=0)
    torch.testing.assert_close(moments.variance, X.double().var(0, unbiased=False), rtol=RTOL, atol=0)
    torch.testing.assert_close(moments.norms, X.double().norm(dim=0), rtol=RTOL, atol=0)


def test_prune_flap_moments_merge_like_one_pass() -> None:
    """Moments of two halves, merged, are those of the whole; an empty part changes nothing."""
    X = drawn(64, 5)
    whole, half = moments_of(X), moments_of(X[:20])
    half.merge(moments_of(X[20:]))
    half.merge(Moments(5))
    assert half.tokens == 64
    torch.testing.assert_close(half.variance, whole.variance, rtol=RTOL, atol=0)


def test_prune_flap_variance_survives_a_large_mean() -> None:
    """A mean ten thousand times the deviation, as massive activations have, leaves the variance right."""
    X = drawn(1000, 3).double() + 1e4
    moments = moments_of(X.float(), 37, 463, 500)
    expected = X.float().double().var(0, unbiased=False)
    torch.testing.assert_close(moments.variance, expected, rtol=1e-3, atol=0)  # float32 holds 1e4 to 1e-3


def test_prune_flap_variance_of_a_constant_is_zero() -> None:
    """An input that never changes has no fluctuation at all, whatever its value."""
    moments = moments_of(torch.full((50, 2), 0.1), 7, 43)
    assert moments.variance.tolist() == pytest.approx([0.0, 0.0], abs=1e-17)
    assert moments.mean.tolist() == pytest.approx([0.1, 0.1], rel=1e-6)


@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN"])
def test_prune_flap_metrics_equal_their_formula(metric: str) -> None:
    """Each metric is what a loop over channels computes from its definition."""
    W, X = drawn(4, 6), drawn(90, 6, seed=1) + 0.5
    found = channel_scores(W, moments_of(X, 40, 50), metric)
    for j in range(6):
        x, w = X[:, j].double(), W[:, j].double()
        expected = {
            "WIFV": x.var(unbiased=False) * (w**2).sum(),
            "IFV": x.var(unbiased=False),
            "WIFN": w.abs().mean() * x.norm(),
        }[metric]
        assert float(found[j]) == pytest.approx(float(expected), rel=RTOL)


def test_prune_flap_squares_attention_and_not_the_mlp() -> None:
    """A head has the mean of its channels' squared and standardised scores, a neuron its standardised score."""
    scores = drawn(12).abs().double()
    heads = UnitGroup("heads", "attn", "attn.o", ("attn.q", "attn.k", "attn.v"), 12, 4)
    squared = scores**2
    expected = ((squared - squared.mean()) / squared.std()).view(3, 4).mean(1)
    torch.testing.assert_close(member_scores(heads, scores), expected)
    neurons = UnitGroup("neurons", "mlp", "mlp.down", ("mlp.up",), 12)
    torch.testing.assert_close(member_scores(neurons, scores), (scores - scores.mean()) / scores.std())


def test_prune_flap_standardises_equal_scores_to_zero() -> None:
    """Channels that are all alike, or a single one, have no order, and no NaN."""
    assert standardised(torch.full((5,), 2.0)).tolist() == [0.0] * 5
    assert standardised(torch.tensor([2.0])).tolist() == [0.0]


def test_prune_flap_compensation_is_exact_for_constant_inputs() -> None:
    """Where the channels that go never change, the bias gives exactly what they gave."""
    W, X = drawn(5, 8), drawn(40, 8, seed=1)
    kept = torch.tensor([True, False, True, True, False, True, True, False])
    X[:, ~kept] = torch.tensor([0.5, -2.0, 3.0])
    b = compensation(W, kept, moments_of(X, 13, 27).mean)
    torch.testing.assert_close(X[:, kept] @ W[:, kept].T + b, X @ W.T, rtol=RTOL, atol=1e-6)


def test_prune_flap_compensation_keeps_the_mean_output() -> None:
    """Whatever the channels do, the mean of the output over the calibration tokens stays."""
    W, X = drawn(5, 8), drawn(400, 8, seed=1) + 1
    kept = torch.arange(8) % 3 != 0
    left = X[:, kept] @ W[:, kept].T + compensation(W, kept, moments_of(X).mean)
    torch.testing.assert_close(left.mean(0), (X @ W.T).mean(0), rtol=1e-4, atol=1e-5)


def test_prune_flap_takes_equal_heads_from_every_shared_group() -> None:
    """A unit of shared keys is the weakest query head of each group, so that as many are left in each."""
    group = UnitGroup("heads", "attn", "attn.o", ("attn.q",), 12, 2, shared=2)  # heads 0-2 and 3-5
    members = group.ranked(torch.tensor([3.0, 1.0, 2.0, 4.0, 9.0, 0.0]))
    assert members.tolist() == [[1, 5], [2, 3], [0, 4]]
    kept = group.keeping(members[:1]).view(6, 2)
    assert kept.tolist() == [[head not in (1, 5)] * 2 for head in range(6)]
