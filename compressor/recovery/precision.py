"""Mixed precision and determinism of a repair: float32 master weights, autocast where asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.ranks import ALONE, Ranks


class Precision(Protocol):
    """What is known of where and in which type a forward pass computes; a block's IO is one."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """bfloat16 or float16 for mixed precision, ``None`` for float32."""


def autocast(precision: Precision) -> torch.autocast:
    """The context in which a forward pass runs: its ``amp_dtype``, or plain float32."""
    enabled = precision.amp_dtype is not None
    return torch.autocast(precision.device.type, dtype=precision.amp_dtype, enabled=enabled)


class Stepper:
    """Backward, clip and step in the right order: the gradient is unscaled before it is clipped.

    Only float16 needs a loss scale; bfloat16 has float32's range. The published EBFT code clips gradients
    that still carry the scale, which shrinks every update (recipes/ebft-paper.yaml says more).

    Args:
        optimizer: Holds ``weights``.
        weights: What is trained, float32.
        precision: Says device and type.
        max_grad_norm: Longest gradient, over all weights together; ``None`` does not clip.
        ranks: Whose gradients are added up.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Sequence[nn.Parameter],
        precision: Precision,
        max_grad_norm: float | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._optimizer = optimizer
        self._weights = weights
        self._max_grad_norm = max_grad_norm
        self._ranks = ranks
        enabled = precision.amp_dtype == torch.float16
        self._scaler = torch.amp.GradScaler(precision.device.type, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, which still carry the loss scale; one of several ranks' may have none."""
        scaled = self._scaler.scale(loss)
        if scaled.requires_grad or self._ranks.world == 1:
            scaled.backward()  # type: ignore[no-untyped-call]

    def unscale(self) -> None:
        """Add up all ranks' gradients and bring them into true units; once for each step, before :meth:`step`."""
        self._ranks.sum_gradients(self._weights)
        self._scaler.unscale_(self._optimizer)

    def step(self, lr: float) -> None:
        """Clip, update the weights with this learning rate, forget the gradients; no wait for the device."""
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._weights, self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Ask CUDA kernels for a fixed order of summation while inside (the CPU's have one); restored after."""
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # its one setting is a property that type checkers do not see
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory only costs time: nothing here reads what it has not written.
    settings.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            # cuBLAS asks for a workspace setting that only matters with several compute streams; here is one.
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


@contextmanager
def random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers of the CPU and of ``device`` from ``seed`` while inside; both states restored after."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
