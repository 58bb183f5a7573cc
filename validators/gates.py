"""The two checks on perplexity: ONNX against the PyTorch sparse model, and against the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping

from validators.checks import Check, Gates, Tolerance, at_most, skipped

_UNIT = "relative"


def drift_check(
    perplexity: Mapping[str, float | None], tolerance: Tolerance, gates: Gates, reference: str = "recovered"
) -> Check:
    """|onnx / reference - 1| against its limit; an ONNX perplexity that is not finite fails on its own.

    Args:
        perplexity: By ``PERPLEXITY_KEYS``.
        tolerance: Has the limit that counts without a gate.
        gates: The user's limits.
        reference: Which version the file was made of: ``recovered``, or ``quantized``.
    """
    name = "perplexity-drift"
    onnx, recovered = perplexity["onnx"], perplexity[reference]
    if onnx is None:
        return skipped(name, "no evaluation windows were given")
    if not math.isfinite(onnx):
        return Check(name, "failed", measured=onnx, unit=_UNIT, why=f"the ONNX model's perplexity is {onnx}")
    if recovered is None:
        return skipped(name, "the PyTorch sparse model's perplexity is not known, and there is no reference")
    limit = tolerance.ppl_drift if gates.max_onnx_ppl_drift is None else gates.max_onnx_ppl_drift
    return at_most(name, abs(onnx / recovered - 1), limit, _UNIT, f"{onnx:.6g} against {recovered:.6g}")


def increase_check(perplexity: Mapping[str, float | None], gates: Gates) -> Check:
    """onnx / dense - 1 against the gate; skipped without a gate, because there is no default."""
    name = "perplexity-increase"
    onnx, dense = perplexity["onnx"], perplexity["dense"]
    if onnx is None:
        return skipped(name, "no evaluation windows were given")
    if dense is None:
        return skipped(name, "the dense model's perplexity is not known (--dense MODEL measures it)")
    increase = onnx / dense - 1
    if gates.max_ppl_increase is None:
        why = f"no limit was set with --max-ppl-increase; {onnx:.6g} against {dense:.6g}"
        return skipped(name, why, measured=increase, unit=_UNIT)
    return at_most(name, increase, gates.max_ppl_increase, _UNIT, f"{onnx:.6g} against {dense:.6g}")


def implied_requirements(gates: Gates) -> tuple[str, ...]:
    """The checks that gates ask for: a limit that somebody set must not be passed by not looking."""
    asked = {
        "parity-prefill": (gates.max_abs_error, gates.min_top1_agreement),
        "perplexity-drift": (gates.max_onnx_ppl_drift,),
        "perplexity-increase": (gates.max_ppl_increase,),
        "sparsity": (gates.min_sparsity,),
    }
    return tuple(name for name, limits in asked.items() if any(limit is not None for limit in limits))
