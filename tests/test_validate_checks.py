"""Checks, gates, tolerances and the verdict."""

from __future__ import annotations

import json
import math

import pytest

from validators.checks import (
    CHECK_NAMES,
    TOLERANCES,
    Check,
    Gates,
    ValidationReport,
    at_least,
    at_most,
    complete,
    skipped,
)
from validators.gates import drift_check, implied_requirements, increase_check

PERPLEXITY = {"dense": 10.0, "pruned": 30.0, "recovered": 12.0, "quantized": None, "onnx": 12.0}


@pytest.mark.parametrize(("measured", "status"), [(1.0, "passed"), (1.1, "failed"), (math.nan, "failed")])
def test_at_most_passes_up_to_its_limit_and_fails_nan(measured: float, status: str) -> None:
    """A figure at the limit passes; one above it, or that is no number, fails."""
    assert at_most("finite", measured, 1.0, "").status == status


@pytest.mark.parametrize(("measured", "status"), [(1.0, "passed"), (0.9, "failed"), (math.nan, "failed")])
def test_at_least_passes_from_its_limit_and_fails_nan(measured: float, status: str) -> None:
    """A figure at the limit passes; one below it, or that is no number, fails."""
    assert at_least("sparsity", measured, 1.0, "").status == status


def test_verdict_needs_a_passed_check() -> None:
    """A report of nothing but skipped checks has not passed, and a failed one spoils it."""
    passed, failed = Check("finite", "passed"), Check("masks", "failed")
    assert ValidationReport((passed, skipped("manifest", "none"))).passed
    assert not ValidationReport((skipped("manifest", "none"),)).passed
    assert not ValidationReport((passed, failed)).passed
    assert ValidationReport((passed, failed)).failed_checks == (failed,)


def test_required_skipped_check_fails() -> None:
    """A check that could not be made fails when it is required, and the order is the table's."""
    checks = complete([skipped("parity-decode", "no cache"), Check("finite", "passed")], ["parity-decode"])
    assert [check.name for check in checks] == ["finite", "parity-decode"]
    assert checks[1].status == "failed"
    assert "no cache" in checks[1].why
    assert complete([skipped("parity-decode", "no cache")], [])[0].status == "skipped"


def test_report_survives_json() -> None:
    """A report comes back from JSON as it was, figures that are not finite as null."""
    check = Check("parity-prefill", "failed", math.nan, 1e-3, "max", "not a number", {"scale": 2.0})
    report = ValidationReport(
        (check,),
        PERPLEXITY,
        "CPUExecutionProvider",
        "float32",
        "block 1: far off",
        {"load_s": 1.5},
        ("note",),
    )
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["passed"] is False
    assert written["checks"][0]["measured"] is None
    again = ValidationReport.from_json(written)
    assert again.checks[0].details == {"scale": 2.0}
    assert (again.perplexity, again.provider, again.timings) == (PERPLEXITY, report.provider, report.timings)
    assert again.first_divergence == report.first_divergence


def test_tolerances_widen_with_fewer_bits() -> None:
    """Each limit of a narrower type is at least as wide as that of a wider one."""
    exact, half, brain = (TOLERANCES[name] for name in ("float32", "float16", "bfloat16"))
    for narrow, wide in ((exact, half), (half, brain)):
        assert narrow.relative_error < wide.relative_error
        assert narrow.top1_agreement > wide.top1_agreement
        assert narrow.mean_kl < wide.mean_kl
        assert narrow.ppl_drift < wide.ppl_drift


@pytest.mark.parametrize(
    ("onnx", "status"),
    [(12.0, "passed"), (12.011, "passed"), (12.013, "failed"), (11.98, "failed"), (math.nan, "failed")],
)
def test_drift_is_judged_both_ways(onnx: float, status: str) -> None:
    """0.1 % beside PyTorch's perplexity is the limit in float32, above and below; NaN is beyond it."""
    check = drift_check({**PERPLEXITY, "onnx": onnx}, TOLERANCES["float32"], Gates())
    assert check.status == status


def test_drift_fails_infinite_onnx_even_without_reference() -> None:
    """A model whose perplexity is not finite is wrong without any comparison."""
    check = drift_check({**PERPLEXITY, "onnx": math.inf, "recovered": None}, TOLERANCES["float32"], Gates())
    assert check.status == "failed"


def test_drift_gate_replaces_the_default() -> None:
    """The user's limit is used, the default is not."""
    perplexity = {**PERPLEXITY, "onnx": 12.5}
    gates = Gates(max_onnx_ppl_drift=0.05)
    assert drift_check(perplexity, TOLERANCES["float32"], gates).status == "passed"
    assert drift_check(perplexity, TOLERANCES["float32"], Gates()).status == "failed"


def test_drift_skips_what_it_cannot_compare() -> None:
    """Without windows or without PyTorch's figure there is no verdict, and a reason."""
    for missing in ("onnx", "recovered"):
        check = drift_check({**PERPLEXITY, missing: None}, TOLERANCES["float32"], Gates())
        assert check.status == "skipped"
        assert check.why


@pytest.mark.parametrize(("limit", "status"), [(0.2, "passed"), (0.19, "failed"), (None, "skipped")])
def test_increase_is_judged_only_with_a_gate(limit: float | None, status: str) -> None:
    """20 % more than dense passes a gate of 20 %, fails one of 19 %, and is only shown without one."""
    check = increase_check(PERPLEXITY, Gates(max_ppl_increase=limit))
    assert check.status == status
    assert check.measured == pytest.approx(0.2)


def test_increase_fails_nan() -> None:
    """A perplexity that is no number is no small increase."""
    check = increase_check({**PERPLEXITY, "onnx": math.nan}, Gates(max_ppl_increase=9.0))
    assert check.status == "failed"


def test_gates_require_their_check() -> None:
    """A limit that was set may not be passed by not measuring."""
    assert implied_requirements(Gates()) == ()
    gates = Gates(max_ppl_increase=0.1, min_sparsity=0.5)
    assert set(implied_requirements(gates)) == {"perplexity-increase", "sparsity"}
    assert set(implied_requirements(Gates(max_abs_error=1, max_onnx_ppl_drift=1))) <= set(CHECK_NAMES)
