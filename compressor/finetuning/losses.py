"""What the whole model is tuned towards: the text, the dense model's logits, the dense model's hidden states.

Notation: B windows of T tokens, n of their tokens, hidden width D, vocabulary V, L blocks; S is the sparse
model, T in an exponent the dense one (the teacher).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Logits of this many elements are held at once, and computed again for the backward pass where there are more.
LOGITS = 2**25
# Added to the mean square that a layer is divided by (SparseFinetuning: the epsilon of bfloat16).
_SQUAREHEAD_EPS = torch.finfo(torch.bfloat16).eps


@dataclass(frozen=True)
class Objective:
    """L = h_ce · CE + h_kd · KL + h_sq · SquareHead (arXiv 2310.06927, section 3).

    Attributes:
        ce: h_ce, weight of the cross entropy with the text.
        kd: h_kd, weight of the divergence from the dense model's logits.
        sq: h_sq, weight of the layers' normalised squared errors.
        temperature: Of the logits in KL.
        noise: Share of a training window's tokens that are exchanged (``compressor.finetuning.noise``); for objectives
            that ask the dense model alone, since the text does not go on from tokens that it has not.
        noise_from: The text, or the dense model, which is asked what it expects there.
        noise_fades: Whether the share falls to 0 in a line over the steps.
    """

    ce: float = 0.0
    kd: float = 0.0
    sq: float = 0.0
    temperature: float = 1.0
    noise: float = 0.0
    noise_from: Literal["text", "model"] = "text"
    noise_fades: bool = False

    @property
    def name(self) -> str:
        """``ce``, ``kl``, ``ce + squarehead``."""
        parts = (("ce", self.ce), ("kl", self.kd), ("squarehead", self.sq))
        return " + ".join(f"{weight:g} {name}" if weight != 1 else name for name, weight in parts if weight)


def cross_entropy(logits: Tensor, following: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(logits)[following], nats.

    Args:
        logits: (..., V) float32.
        following: (...) int64: the token that comes next.
    """
    return nn.functional.cross_entropy(logits.flatten(0, -2), following.flatten(), reduction="sum")


def kl_divergence(dense: Tensor, sparse: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over tokens of τ² · KL(p ‖ q), nats, with p = softmax(dense / τ), q = softmax(sparse / τ).

    The factor τ² keeps the size of the gradients as τ changes (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        dense: Logits (..., V) float32 of the dense model.
        sparse: Logits of the sparse model.
        temperature: τ.
    """
    p = nn.functional.log_softmax(dense / temperature, dim=-1)
    q = nn.functional.log_softmax(sparse / temperature, dim=-1)
    return temperature**2 * nn.functional.kl_div(q, p, reduction="sum", log_target=True)


def squarehead(
    sparse: Sequence[Tensor], dense: Sequence[Tensor], powers: Sequence[Tensor] | None = None
) -> Tensor:
    """Σ over l = 1 … L of mean((h_l^S − h_l^T)²) / (mean((h_l^T)²) + ε), over all tokens and channels of a batch.

    Source: arXiv 2310.06927, equation 2, and SparseFinetuning's train_sparse.py (ε; one ratio per layer).

    Args:
        sparse: Output (B, T, D) of each block; the embedding is none of them.
        dense: The same of the dense model.
        powers: mean((h_l^T)²) of each layer, where the batch is only part of the one that is meant; ``None`` takes
            it from ``dense``.
    """
    powers = layer_powers(dense) if powers is None else powers
    terms = [
        (S.float() - T.float()).square().mean() / (power + _SQUAREHEAD_EPS)
        for S, T, power in zip(sparse, dense, powers, strict=True)
    ]
    return torch.stack(terms).sum()


def layer_powers(dense: Sequence[Tensor]) -> list[Tensor]:
    """mean((h_l^T)²) of each layer's states, float32."""
    return [T.float().square().mean() for T in dense]


def token_loss(
    objective: Objective,
    head: Callable[[Tensor], Tensor],
    sparse: Tensor,
    dense: Tensor | None,
    ids: Tensor,
    *,
    vocab_size: int,
) -> Tensor:
    """h_ce · mean over B · (T − 1) tokens of CE + h_kd · mean over B · T tokens of KL.

    The logits of a large vocabulary exist for a few tokens at a time, in the backward pass too.

    Args:
        objective: The weights.
        head: (b, t, D) -> logits (b, t, V), token by token.
        sparse: Last hidden states (B, T, D) of the sparse model.
        dense: The same of the dense model; only KL asks for them.
        ids: (B, T).
        vocab_size: V.
    """
    windows, seqlen = ids.shape
    pieces = list(_pieces(windows, seqlen, max(1, LOGITS // vocab_size)))

    def of_piece(rows: slice, tokens: slice) -> Tensor:
        logits = head(sparse[rows, tokens])
        total = logits.new_zeros(())
        if objective.ce:
            following = ids[rows, tokens.start + 1 : tokens.stop + 1]  # the last token of a window has none
            total = total + objective.ce / (windows * (seqlen - 1)) * cross_entropy(
                logits[:, : following.shape[1]], following
            )
        if objective.kd:
            assert dense is not None
            with torch.no_grad():
                wanted = head(dense[rows, tokens])
            kl = kl_divergence(wanted, logits, objective.temperature)
            total = total + objective.kd / (windows * seqlen) * kl
        return total

    if len(pieces) == 1:
        return of_piece(*pieces[0])
    # The hidden states are no arguments of the checkpoint but what the closure holds; autograd follows both.
    return torch.stack([checkpoint(of_piece, *piece, use_reentrant=False) for piece in pieces]).sum()


def _pieces(windows: int, seqlen: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens of pieces of at most ``tokens`` tokens: whole windows where they fit, parts of one else."""
    at_once = max(1, tokens // seqlen)
    length = min(seqlen, tokens)
    for row in range(0, windows, at_once):
        for start in range(0, seqlen, length):
            yield slice(row, min(row + at_once, windows)), slice(start, min(start + length, seqlen))
