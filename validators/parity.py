"""Whether the ONNX file computes what the reference computes: logits on real text, three ways of running.

Prefill: whole windows at once. Decode: half a window at once, the rest token by token over the KV cache.
Padded: a batch of different lengths, padded on the left, its last tokens one by one. The reference always
sees whole sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from validators.checks import Check, Gates, Tolerance, skipped
from validators.reference import Floats, Ids, Reference

PREFILL_WINDOWS, PREFILL_TOKENS = 3, 128
DECODE_TOKENS = 64  # half of them at once, the other half one by one
PADDED_ROWS, PADDED_TOKENS = 3, 64
PADDED_STEPS = 4


@dataclass(frozen=True)
class ParityCase:
    """Sequences and how the ONNX model runs them.

    Attributes:
        name: The check that it decides.
        ids: (B, T) int64.
        attention_mask: (B, T) int64, 0 at padding on the left; None: no padding.
        prefix: Tokens of the first call, the rest follows one by one; None: all at once.
    """

    name: str
    ids: Ids
    attention_mask: Ids | None = None
    prefix: int | None = None

    @property
    def real(self) -> NDArray[np.bool_]:
        """(B, T) bool: tokens that are not padding."""
        return np.ones(self.ids.shape, bool) if self.attention_mask is None else self.attention_mask != 0


@dataclass(frozen=True)
class LogitErrors:
    """How far the ONNX logits are from the reference's, over all tokens that are not padding.

    Attributes:
        max_abs: Largest absolute difference of one logit; NaN if either side is not finite.
        relative: Largest over the tokens of |difference|_2 / |reference|_2.
        scale: Largest absolute reference logit.
        mean_kl: Mean KL(reference || ONNX) per token, in nats.
        top1_agreement: Share of the decided tokens with the same most likely next token (see ``Tolerance``).
        raw_top1_agreement: The same over all tokens, ties included.
        tokens: Tokens compared.
        decided: Tokens whose reference margin is above the absolute error limit.
    """

    max_abs: float
    relative: float
    scale: float
    mean_kl: float
    top1_agreement: float
    raw_top1_agreement: float
    tokens: int
    decided: int


class LanguageModel(Protocol):
    """The ONNX model as parity runs it: loaded whole, or block by block."""

    @property
    def cache(self) -> object:
        """True where it has a KV cache."""

    @property
    def has_attention_mask(self) -> bool:
        """Whether it can be told of padding."""

    def run(
        self, ids: Ids, attention_mask: Ids | None, outputs: Sequence[str], prefix: int | None = None
    ) -> dict[str, Floats]:
        """See ``validators.causal_lm.CausalLM.run``."""


def parity_cases(windows: Ids, model: LanguageModel) -> tuple[list[ParityCase], list[Check]]:
    """The cases that the graph can run on these windows of text (N, T), and skipped checks for the rest."""
    prefill = ParityCase("parity-prefill", windows[:PREFILL_WINDOWS, :PREFILL_TOKENS])
    cases, impossible = [prefill], []
    decode = windows[-1:, :DECODE_TOKENS]
    if not model.cache:
        impossible.append(skipped("parity-decode", "the graph has no KV cache inputs"))
    else:
        cases.append(ParityCase("parity-decode", decode, prefix=max(1, decode.shape[1] // 2)))
    if not model.has_attention_mask:
        impossible.append(skipped("parity-padded", "the graph has no attention_mask input"))
    else:
        padded = left_padded(windows)
        prefix = padded.ids.shape[1] - PADDED_STEPS if model.cache else None
        # The cache is continued only where each row has a real token before the last steps.
        usable = prefix is not None and bool(padded.real[:, : max(prefix, 0)].any(axis=1).all())
        cases.append(dataclasses.replace(padded, prefix=prefix if usable else None))
    return cases, impossible


def left_padded(windows: Ids) -> ParityCase:
    """Rows of different lengths, down to a third of the longest, padded on the left with token 0."""
    length = min(windows.shape[1], PADDED_TOKENS)
    ids = np.zeros((PADDED_ROWS, length), np.int64)
    mask = np.zeros_like(ids)
    for row in range(PADDED_ROWS):
        real = max(1, length * (row + 1) // PADDED_ROWS)
        ids[row, length - real :] = windows[row % windows.shape[0], :real]
        mask[row, length - real :] = 1
    return ParityCase("parity-padded", ids, mask)


def run_onnx(model: LanguageModel, case: ParityCase) -> Floats:
    """Logits (B, T, V) of the ONNX model, run the way the case says."""
    return model.run(case.ids, case.attention_mask, ["logits"], case.prefix)["logits"]


def run_reference(reference: Reference, case: ParityCase) -> Floats:
    """Logits (B, T, V) of the reference on the whole sequences."""
    return reference.logits(case.ids, case.attention_mask)


def abs_error_limit(scale: float, tolerance: Tolerance, gates: Gates) -> float:
    """Largest difference of a logit that passes: the gate, or the tolerance at the reference's scale."""
    if gates.max_abs_error is not None:
        return gates.max_abs_error
    return tolerance.relative_error * max(1.0, scale)


def compare_logits(
    expected: Floats, found: Floats, case: ParityCase, tolerance: Tolerance, gates: Gates
) -> LogitErrors:
    """The differences of logits (B, T, V) at the tokens of the case that are not padding."""
    rows = case.real
    reference, measured = expected[rows], found[rows]  # (tokens, V)
    scale = float(np.max(np.abs(reference)))
    margin_limit = abs_error_limit(scale, tolerance, gates)
    per_token = [_token_errors(one, other) for one, other in zip(reference, measured, strict=True)]
    max_abs, relative, kl, margin, same = (np.array(column) for column in zip(*per_token, strict=True))
    decided = margin > margin_limit
    return LogitErrors(
        max_abs=float(np.max(max_abs)),
        relative=float(np.max(relative)),
        scale=scale,
        mean_kl=float(np.mean(kl)),
        top1_agreement=float(np.mean(same[decided])) if decided.any() else 1.0,
        raw_top1_agreement=float(np.mean(same)),
        tokens=len(per_token),
        decided=int(decided.sum()),
    )


def _token_errors(reference: Floats, measured: Floats) -> tuple[float, float, float, float, bool]:
    """Of one token's logits (V,): max abs error, relative error, KL in nats, reference margin, same top-1."""
    expected, found = reference.astype(np.float64), measured.astype(np.float64)
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return np.nan, np.nan, np.nan, np.inf, False
    difference = found - expected
    norm = float(np.linalg.norm(expected))
    log_p, log_q = _log_softmax(expected), _log_softmax(found)
    kl = float(np.sum(np.exp(log_p) * (log_p - log_q)))
    best = int(np.argmax(expected))
    runner_up = np.max(np.delete(expected, best)) if expected.size > 1 else -np.inf
    relative = float(np.linalg.norm(difference)) / norm if norm else float(np.abs(difference).max())
    margin = float(expected[best] - runner_up)
    return float(np.abs(difference).max()), relative, kl, margin, best == int(np.argmax(found))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def judge(case: ParityCase, expected: Floats, found: Floats, tolerance: Tolerance, gates: Gates) -> Check:
    """The check of one case: the largest difference measures it; agreement and KL must hold too."""
    if expected.shape != found.shape:
        return Check(
            case.name,
            "failed",
            why=f"logits of shape {list(found.shape)}, the reference gives {list(expected.shape)}",
        )
    errors = compare_logits(expected, found, case, tolerance, gates)
    limit = abs_error_limit(errors.scale, tolerance, gates)
    least_agreement = gates.min_top1_agreement
    if least_agreement is None:
        least_agreement = tolerance.top1_agreement
    broken = []
    # Written as "not (within)", so that NaN, which is within nothing, breaks each of them.
    if not (errors.max_abs <= limit):
        broken.append(f"max |Δlogit| {errors.max_abs:.3g} is above {limit:.3g}")
    if not (errors.top1_agreement >= least_agreement):
        broken.append(f"top-1 agreement {errors.top1_agreement:.2%} is below {least_agreement:.2%}")
    # A user who sets the gate of the error has said what may differ; the KL default would contradict it.
    if gates.max_abs_error is None and not (errors.mean_kl <= tolerance.mean_kl):
        broken.append(f"mean KL {errors.mean_kl:.3g} nats is above {tolerance.mean_kl:.3g}")
    summary = (
        f"{errors.tokens} tokens, logits up to {errors.scale:.3g}, "
        f"top-1 agreement {errors.top1_agreement:.2%} of {errors.decided} decided, "
        f"mean KL {errors.mean_kl:.2g} nats"
    )
    return Check(
        case.name,
        "failed" if broken else "passed",
        errors.max_abs,
        limit,
        "max |Δlogit|",
        "; ".join(broken) if broken else summary,
        {name: float(value) for name, value in dataclasses.asdict(errors).items()},
    )


def first_divergence(
    model: LanguageModel,
    case: ParityCase,
    expected: Sequence[Floats],
    names: Sequence[str],
    tolerance: Tolerance,
) -> str:
    """One line that says which decoder block first leaves the reference.

    Args:
        model: It has the block outputs among its outputs.
        case: The case that failed.
        expected: The reference's block outputs, (B, T, D) each.
        names: The graph's names of the same values.
        tolerance: Relative to the block's own largest value, at least 1.
    """
    found = model.run(case.ids, case.attention_mask, list(names), case.prefix)
    within: list[float] = []
    for index, (name, reference) in enumerate(zip(names, expected, strict=True)):
        if found[name].shape != reference.shape:
            return (
                f"block {index}: its output has shape {found[name].shape}, the reference's {reference.shape}"
            )
        rows = case.real
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is what it should be here
            error = float(np.max(np.abs(found[name][rows] - reference[rows])))
        scale = max(1.0, float(np.max(np.abs(reference[rows]))))
        if not (error <= tolerance.relative_error * scale):
            block = name.rpartition("/")[0] or name
            return f"block {index}: max |Δ| {error:.2g} behind {block}; {_range_within(within)}"
        within.append(error)
    return f"after the last block, in the final norm or the head; {_range_within(within)}"


def _range_within(errors: Iterable[float]) -> str:
    """ "blocks 0-10 within 2e-05" """
    listed = list(errors)
    if not listed:
        return "no block before it: look at the embeddings, positions and masks too"
    blocks = f"blocks 0-{len(listed) - 1}" if len(listed) > 1 else "block 0"
    return f"{blocks} within {max(listed):.1g}"
