"""What pruners know of a linear's inputs: sums over calibration tokens that can be merged.

Notation: ``X`` is a batch of inputs, (tokens, in). Every statistic is a plain sum over tokens, so two statistics of
disjoint tokens merge by addition, in any order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from compressor.errors import InputRefused


class Statistic(ABC):
    """A sum over the tokens that reached one linear.

    Attributes:
        in_features: Width of the inputs.
        tokens: How many tokens were added; 0 for an expert that no token was routed to.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.tokens = 0
        self._sum = torch.zeros(self.shape(in_features), dtype=torch.float32, device=device)

    @staticmethod
    @abstractmethod
    def shape(in_features: int) -> tuple[int, ...]:
        """Shape of the sum for inputs of this width."""

    @staticmethod
    @abstractmethod
    def of(X: Tensor) -> Tensor:
        """What the tokens ``X`` (tokens, in), float32, contribute to the sum."""

    def add(self, X: Tensor) -> None:
        """Add the tokens ``X`` (..., in), any floating dtype."""
        X = self._as_tokens(X)
        self.add_part(self.of(X), len(X))

    def add_part(self, part: Tensor, tokens: int) -> None:
        """Add a contribution already computed by :meth:`of` over ``tokens`` tokens."""
        self._sum += part.to(self._sum.device)
        self.tokens += tokens

    def merge(self, other: Statistic) -> None:
        """Add the sum of another statistic of the same kind and width."""
        if type(other) is not type(self) or other.in_features != self.in_features:
            raise ValueError(
                f"cannot merge {type(other).__name__}({other.in_features}) into {type(self).__name__}({self.in_features})"
            )
        self.add_part(other._sum, other.tokens)

    def check_finite(self, name: str) -> None:
        """Do nothing when every sum is finite.

        Raises:
            InputRefused: The inputs of ``name`` held NaN or infinity.
        """
        if not bool(torch.isfinite(self._sum).all()):
            raise InputRefused(
                "E-STATISTIC-NONFINITE",
                f"the calibration inputs of {name} hold NaN or infinity",
                "check the model's weights, or run with --device cpu to compute in float32",
            )

    def _as_tokens(self, X: Tensor) -> Tensor:
        if X.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs of width {self.in_features}, got {tuple(X.shape)}")
        return X.detach().reshape(-1, self.in_features).float()


class ColumnNorms(Statistic):
    """Squared length of every input column, for Wanda (arXiv 2306.11695, section 3): s_j = sum_t x_tj^2."""

    @staticmethod
    def shape(in_features: int) -> tuple[int, ...]:
        """``(in,)``."""
        return (in_features,)

    @staticmethod
    def of(X: Tensor) -> Tensor:
        """Sum of squares per column, (in,)."""
        return X.square().sum(0)

    @property
    def norms(self) -> Tensor:
        """Length ||X_j||_2 of every input column, (in,) float32."""
        return self._sum.sqrt()


class Gram(Statistic):
    """Inner products of the input columns, for SparseGPT (arXiv 2301.00774, section 3): G = X^T X."""

    @staticmethod
    def shape(in_features: int) -> tuple[int, ...]:
        """``(in, in)``."""
        return (in_features, in_features)

    @staticmethod
    def of(X: Tensor) -> Tensor:
        """X^T X, (in, in), in full float32 (TF32's ten bits of mantissa make the sum indefinite)."""
        with _full_precision():
            return X.T @ X

    def gram(self) -> Tensor:
        """sum_t x_t x_t^T, (in, in) float32; the statistic's own storage, do not write to it."""
        return self._sum


class BlockStatistics:
    """One statistic for each matrix of a block; matrices fed by the same tensor share its computation.

    Args:
        kind: The statistic that the pruner asks for.
        in_features: Input width per matrix name.
        device: Where the sums live.
    """

    def __init__(
        self, kind: type[Statistic], in_features: Mapping[str, int], device: torch.device | str = "cpu"
    ) -> None:
        self._statistics = {name: kind(width, device) for name, width in in_features.items()}
        self._last: tuple[Tensor, int, Tensor] | None = None  # inputs, their version, their contribution

    def __getitem__(self, name: str) -> Statistic:
        return self._statistics[name]

    def receive(self, name: str, X: Tensor) -> None:
        """Add the inputs ``X`` (..., in) of the matrix ``name``."""
        statistic = self._statistics[name]
        part = self._part_of(X)
        if part is None:
            part = statistic.of(statistic._as_tokens(X))
            self._last = (X, X._version, part)
        statistic.add_part(part, X.numel() // statistic.in_features)

    def finish(self) -> None:
        """Let go of the last batch that is held for sharing."""
        self._last = None

    def _part_of(self, X: Tensor) -> Tensor | None:
        """The contribution of the last batch if ``X`` is that batch (q, k and v are fed by one tensor)."""
        if self._last is None:
            return None
        last, version, part = self._last
        # The held reference keeps the storage alive, so an equal address means the same values.
        same_place = last.data_ptr() == X.data_ptr() and last.dtype == X.dtype and last.device == X.device
        same_view = (
            last.numel() == X.numel()
            and last.shape[-1] == X.shape[-1]
            and last.is_contiguous()
            and X.is_contiguous()
        )
        return (
            part if same_place and same_view and X._version == version and last._version == version else None
        )


@contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever the process has chosen; restored after."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
