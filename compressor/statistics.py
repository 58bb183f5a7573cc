"""What pruners know of a linear's inputs: sums over calibration tokens that can be merged.

Notation: ``X`` is a batch of inputs, (tokens, in). Every statistic is a plain sum over tokens, so two
statistics of disjoint tokens merge by addition, in any order.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.ranks import ALONE, Ranks

Kind = TypeVar("Kind", bound="Statistic")
Derived = TypeVar("Derived")


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
        self._derived: dict[Hashable, Any] = {}
        self._derived_of = self._sum._version

    def __repr__(self) -> str:
        return f"{type(self).__name__}(in_features={self.in_features}, tokens={self.tokens})"

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
        X = self.as_tokens(X)
        self.add_part(self.of(X), len(X))

    def add_part(self, part: Tensor, tokens: int) -> None:
        """Add a contribution already computed by :meth:`of` over ``tokens`` tokens."""
        self._sum += part.to(self._sum.device)
        self.tokens += tokens

    def plus(self: Kind, part: Tensor, tokens: int) -> Kind:
        """A new statistic: this one and a contribution over ``tokens`` tokens."""
        total = copy.copy(self)
        total._sum = self._sum + part.to(self._sum.device)
        total.tokens = self.tokens + tokens
        total.forget()
        return total

    def derived(self, key: Hashable, of: Callable[[Tensor], Derived]) -> Derived:
        """``of`` the sum, computed once per ``key`` while the sum stays as it is; not to be written to."""
        if self._derived_of != self._sum._version:
            self.forget()
        if key not in self._derived:
            self._derived[key] = of(self._sum)
        result: Derived = self._derived[key]
        return result

    def over(self: Kind, ranks: Ranks) -> Kind:
        """A new statistic of the tokens of all ranks; their sums are put together in float64."""
        merged = copy.copy(self)
        merged._sum = ranks.summed(self._sum.double()).float()
        merged.tokens = int(ranks.total(self.tokens)[0])
        merged.forget()
        return merged

    def forget(self) -> None:
        """Let go of what was derived."""
        self._derived, self._derived_of = {}, self._sum._version

    def merge(self, other: Statistic) -> None:
        """Add the sum of another statistic of the same kind and width."""
        if type(other) is not type(self) or other.in_features != self.in_features:
            raise ValueError(f"cannot merge {other!r} into {self!r}")
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

    def as_tokens(self, X: Tensor) -> Tensor:
        """``X`` (..., in) as (tokens, in) float32."""
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
    """What is known of each matrix' inputs; matrices that are fed by the same tensors share one statistic.

    All matrices of one width start with the same empty statistic. They part when one of them receives what the
    others do not, so q, k and v hold one Gram matrix between them, and what is derived of it is computed once.

    Args:
        kind: The statistic that the pruner asks for.
        in_features: Input width per matrix name.
        device: Where the sums live.
    """

    def __init__(
        self, kind: type[Statistic], in_features: Mapping[str, int], device: torch.device | str = "cpu"
    ) -> None:
        empty = {width: kind(width, device) for width in sorted(set(in_features.values()))}
        self._statistics = {name: empty[width] for name, width in in_features.items()}
        self._last: _Contribution | None = None
        self._asked: Statistic | None = None

    def __getitem__(self, name: str) -> Statistic:
        """The statistic of a matrix; what was derived of the one asked for before, if another, is let go."""
        statistic = self._statistics[name]
        if self._asked is not None and self._asked is not statistic:
            self._asked.forget()
        self._asked = statistic
        return statistic

    def receive(self, name: str, X: Tensor) -> None:
        """Add the inputs ``X`` (..., in) of the matrix ``name``."""
        before = self._statistics[name]
        if self._last is None or not self._last.is_of(X):
            self._last = _Contribution(X, X._version, before.of(before.as_tokens(X)))
        part, tokens, grown = self._last.part, X.numel() // before.in_features, self._last.grown
        if id(before) in grown:
            self._statistics[name] = grown[id(before)][1]
        elif self._is_shared(name) or any(after is before for _, after in grown.values()):
            self._statistics[name] = before.plus(part, tokens)
            grown[id(before)] = before, self._statistics[name]
        else:
            before.add_part(part, tokens)

    def _is_shared(self, name: str) -> bool:
        """Whether other matrices hold the statistic of ``name`` too."""
        mine = self._statistics[name]
        return any(other is mine for key, other in self._statistics.items() if key != name)

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Let go of the last batch, which is held for sharing; add what the other ranks have received."""
        self._last = None
        if ranks.world > 1:
            self._merge(ranks)

    def _merge(self, ranks: Ranks) -> None:
        """Statistics over the tokens of all ranks; two matrices share one where they do on every rank."""
        names = list(self._statistics)
        first: dict[int, int] = {}
        here = [first.setdefault(id(one), place) for place, one in enumerate(self._statistics.values())]
        shared = torch.stack(ranks.gathered(torch.tensor(here, dtype=torch.int64)))  # (ranks, matrices)
        merged: dict[tuple[int, ...], Statistic] = {}
        for name, key in zip(names, map(tuple, shared.T.tolist()), strict=True):
            if key not in merged:
                merged[key] = self._statistics[name].over(ranks)
            self._statistics[name] = merged[key]
        self._asked = None


@dataclass(frozen=True)
class _Contribution:
    """What one batch of inputs adds; q, k and v are fed by one tensor and add the same."""

    X: Tensor
    version: int  # counts writes into the tensor
    part: Tensor
    grown: dict[int, tuple[Statistic, Statistic]] = field(default_factory=dict)  # by id: without and with it

    def is_of(self, X: Tensor) -> bool:
        """Whether ``X`` is the same memory, seen the same way, unchanged since.

        ``self.X`` keeps that memory from being reused, so an equal address means equal values.
        """
        return (
            self.X.data_ptr() == X.data_ptr()
            and (self.X.device, self.X.dtype) == (X.device, X.dtype)
            and self.X.shape[-1] == X.shape[-1]
            and self.X.numel() == X.numel()
            and self.X.is_contiguous()
            and X.is_contiguous()
            and self.version == self.X._version == X._version
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
