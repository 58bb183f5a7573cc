"""Mean and variance of a linear's inputs, of tokens that come in batches.

Notation: ``X`` is a batch of inputs, (n, in); μ and M are mean and summed squared deviation per column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.ranks import Ranks


class Moments:
    """Count, mean and summed squared deviation of every input column over the tokens so far, float64.

    Batches merge by the pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm
    for computing sample variances", 1979), which is Welford's for a batch of one. FLAP's published code updates
    its mean in place before it takes the old one, so that its sum is of (x − μ_new)² instead of
    (x − μ_old)(x − μ_new), and drops the first batch; neither is repeated here.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._mean = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._deviation = torch.zeros_like(self._mean)

    def add(self, X: Tensor) -> None:
        """Add the tokens ``X`` (..., in), any floating dtype."""
        X = X.detach().reshape(-1, X.shape[-1]).to(self._mean.device).float()
        if len(X):
            # Only the sums are float64: a copy of the batch in it would be the largest tensor of the survey.
            mean = X.sum(0, dtype=torch.float64) / len(X)
            centre = mean.float()
            around = (X - centre).square().sum(0, dtype=torch.float64)
            self._merge(len(X), mean, (around - len(X) * (centre - mean).square()).clamp(min=0))

    def merge(self, other: Moments) -> None:
        """Add the tokens that ``other`` has seen."""
        if other.tokens:
            self._merge(other.tokens, other._mean, other._deviation)

    def merge_ranks(self, ranks: Ranks) -> None:
        """Add the tokens that the other ranks have seen, in the order of the ranks."""
        if ranks.world == 1:
            return
        counts = ranks.gathered(torch.tensor(self.tokens))
        means, deviations = ranks.gathered(self._mean), ranks.gathered(self._deviation)
        device = self._mean.device
        self.tokens, self._mean = 0, torch.zeros_like(self._mean)
        self._deviation = torch.zeros_like(self._mean)
        for tokens, mean, deviation in zip(map(int, counts), means, deviations, strict=True):
            if tokens:
                self._merge(tokens, mean.to(device), deviation.to(device))

    @property
    def mean(self) -> Tensor:
        """E[x_j] of every column, (in,) float64."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Var(x_j) = E[(x_j − E[x_j])²] of every column, (in,) float64."""
        return self._deviation / max(1, self.tokens)

    @property
    def norms(self) -> Tensor:
        """Length ||X_j||_2 of every column, (in,) float64."""
        return (self._deviation + self.tokens * self._mean.square()).sqrt()

    def _merge(self, n: int, mean: Tensor, deviation: Tensor) -> None:
        """μ += δ n/N, M += M' + δ² n (N − n)/N with δ = μ' − μ and N tokens in all."""
        total = self.tokens + n
        delta = mean - self._mean
        self._mean = self._mean + delta * (n / total)
        self._deviation = self._deviation + deviation + delta.square() * (n * self.tokens / total)
        self.tokens = total
