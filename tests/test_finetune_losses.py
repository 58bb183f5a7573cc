"""Losses of end-to-end tuning: equal to plain formulas, in one piece or in many."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compressor.finetuning import losses
from compressor.finetuning.losses import Objective, cross_entropy, kl_divergence, squarehead, token_loss

VOCAB, WIDTH, WINDOWS, SEQLEN = 11, 5, 3, 7


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HEAD = drawn(VOCAB, WIDTH, seed=3)


def head(hidden: Tensor) -> Tensor:
    """Logits of a linear head."""
    return hidden @ HEAD.T


def test_kl_of_equal_logits_is_zero_and_so_is_its_gradient() -> None:
    """A model that predicts like the dense one has nothing to learn (softmax of equals rounds equally: 1e-6)."""
    logits = drawn(4, VOCAB).requires_grad_()
    loss = kl_divergence(logits.detach().clone(), logits)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_equals_its_definition(temperature: float) -> None:
    """τ² Σ p log(p / q), token by token in float64 (float32 logs: 1e-5)."""
    dense, sparse = drawn(4, VOCAB), drawn(4, VOCAB, seed=1)
    expected = 0.0
    for row in range(4):
        p = (dense[row].double() / temperature).exp()
        q = (sparse[row].double() / temperature).exp()
        p, q = p / p.sum(), q / q.sum()
        expected += temperature**2 * sum(
            float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True)
        )
    assert float(kl_divergence(dense, sparse, temperature)) == pytest.approx(expected, rel=1e-5)


def test_kl_gradient_is_the_difference_of_the_predictions() -> None:
    """d KL / d logits of the sparse model is q − p; at temperature τ it is τ (q − p)."""
    dense, sparse = drawn(4, VOCAB), drawn(4, VOCAB, seed=1).requires_grad_()
    kl_divergence(dense, sparse, 2.0).backward()
    expected = 2.0 * (torch.softmax(sparse.detach() / 2, -1) - torch.softmax(dense / 2, -1))
    torch.testing.assert_close(sparse.grad, expected)


def test_cross_entropy_equals_its_definition() -> None:
    """The sum of -log softmax at the next token."""
    logits, following = drawn(2, 3, VOCAB), torch.tensor([[1, 2, 3], [4, 5, 6]])
    probabilities = torch.softmax(logits.double(), -1)
    expected = -sum(
        math.log(float(probabilities[row, t, following[row, t]])) for row in range(2) for t in range(3)
    )
    assert float(cross_entropy(logits, following)) == pytest.approx(expected, rel=1e-6)


def test_squarehead_equals_its_definition() -> None:
    """One ratio of sums per layer over all tokens and channels, bfloat16's epsilon below (float32 sums: 1e-5)."""
    sparse = [drawn(2, 4, WIDTH, seed=seed) for seed in range(3)]
    dense = [drawn(2, 4, WIDTH, seed=seed) * 10**seed for seed in range(3, 6)]
    expected = 0.0
    for S, T in zip(sparse, dense, strict=True):
        pairs = list(zip(S.flatten().tolist(), T.flatten().tolist(), strict=True))
        power = sum(t * t for _, t in pairs) / len(pairs)
        expected += sum((s - t) ** 2 for s, t in pairs) / len(pairs) / (power + 2.0**-7)
    assert float(squarehead(sparse, dense)) == pytest.approx(expected, rel=1e-5)
    assert float(squarehead(dense, dense)) == 0.0


def plain_token_loss(objective: Objective, sparse: Tensor, dense: Tensor, ids: Tensor) -> Tensor:
    """All logits at once, means over tokens."""
    logits = head(sparse)
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    kl = kl_divergence(head(dense), logits, objective.temperature) / ids.numel()
    return objective.ce * ce + objective.kd * kl


@pytest.mark.parametrize(
    "objective", [Objective(ce=1), Objective(kd=1), Objective(ce=0.5, kd=2, temperature=3)]
)
@pytest.mark.parametrize("tokens", [1, 4, 7, 15, 1000])
def test_token_loss_is_the_same_in_pieces(
    monkeypatch: pytest.MonkeyPatch, objective: Objective, tokens: int
) -> None:
    """Whatever number of logits is held at once, loss and gradient are those of all (order of sums: 1e-5)."""
    monkeypatch.setattr(losses, "LOGITS", tokens * VOCAB)
    sparse, dense = drawn(WINDOWS, SEQLEN, WIDTH), drawn(WINDOWS, SEQLEN, WIDTH, seed=1)
    ids = torch.randint(VOCAB, (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(2))
    results = []
    for plain in (True, False):
        leaf = sparse.clone().requires_grad_()
        loss = (
            plain_token_loss(objective, leaf, dense, ids)
            if plain
            else token_loss(objective, head, leaf, dense, ids, vocab_size=VOCAB)
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_token_loss_holds_no_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the head sees more tokens than its logits may fill, forwards or backwards."""
    monkeypatch.setattr(losses, "LOGITS", 4 * VOCAB)
    seen = []

    def watched(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[0] * hidden.shape[1])
        return head(hidden)

    sparse = drawn(WINDOWS, SEQLEN, WIDTH).requires_grad_()
    ids = torch.zeros((WINDOWS, SEQLEN), dtype=torch.long)
    token_loss(Objective(ce=1), watched, sparse, None, ids, vocab_size=VOCAB).backward()
    assert max(seen) <= 4
    assert sum(seen) == 2 * WINDOWS * SEQLEN  # once more in the backward pass


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (Objective(ce=1), "ce"),
        (Objective(ce=1, sq=1), "ce + squarehead"),
        (Objective(ce=0.5, kd=1), "0.5 ce + kl"),
    ],
)
def test_objective_is_named_by_its_terms(objective: Objective, name: str) -> None:
    """The report says what was minimised."""
    assert objective.name == name
