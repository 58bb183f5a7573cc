"""Parity of logits: what counts as the same, and where a graph first goes wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy_language_model import GraphOptions, Weights, pruned_names, random_weights, write_export

from validators.checks import TOLERANCES, Gates, ValidationReport
from validators.examine import examine
from validators.parity import ParityCase, compare_logits, judge, left_padded, parity_cases

EXACT = TOLERANCES["float32"]


def logits_of(*rows: list[float]) -> np.ndarray:
    """One sequence's logits, a row for each token."""
    return np.array([rows], np.float32)


def case_of(logits: np.ndarray, mask: np.ndarray | None = None) -> ParityCase:
    """A case of the logits' batch and length."""
    return ParityCase("parity-prefill", np.zeros(logits.shape[:2], np.int64), mask)


def report_of(
    folder: Path, weights: Weights | None = None, options: GraphOptions | None = None
) -> ValidationReport:
    """The report on an export of ``weights`` against the toy's own."""
    export = write_export(folder, weights=weights, reference=random_weights(), options=options, pattern=None)
    return examine(dataclasses.replace(export.request, masks_path=None))


def statuses(report: ValidationReport) -> dict[str, str]:
    """Status by name of the checks that run the model."""
    return {check.name: check.status for check in report.checks if check.name.startswith(("parity", "perpl"))}


def test_errors_follow_their_definitions() -> None:
    """Largest difference, relative norm, scale, KL and agreement, computed by hand."""
    expected, found = logits_of([3.0, 4.0], [0.0, 2.0]), logits_of([3.0, 4.5], [1.0, 2.0])
    errors = compare_logits(expected, found, case_of(expected), EXACT, Gates())
    assert (errors.max_abs, errors.scale, errors.tokens, errors.decided) == (1.0, 4.0, 2, 2)
    assert errors.relative == pytest.approx(0.5)  # token 2: |(1, 0)| / |(0, 2)|
    p = [np.exp(row) / np.exp(row).sum() for row in expected[0]]
    q = [np.exp(row) / np.exp(row).sum() for row in found[0]]
    by_hand = np.mean([np.sum(a * np.log(a / b)) for a, b in zip(p, q, strict=True)])
    assert errors.mean_kl == pytest.approx(by_hand, rel=1e-5)  # by hand in float32
    assert errors.top1_agreement == 1.0


def test_padding_does_not_count() -> None:
    """What stands at padding may be anything, NaN too."""
    expected = logits_of([9.0, 0.0], [1.0, 2.0])
    found = logits_of([np.nan, 0.0], [1.0, 2.0])
    mask = np.array([[0, 1]])
    assert compare_logits(expected, found, case_of(expected, mask), EXACT, Gates()).max_abs == 0
    assert judge(case_of(expected), expected, found, EXACT, Gates()).status == "failed"


def test_ties_do_not_count_for_agreement() -> None:
    """A reference whose two best logits are closer than the tolerance decides nothing."""
    expected = logits_of([1.0, 1.00001], [0.0, 5.0])
    found = logits_of([1.00001, 1.0], [0.0, 5.0])
    errors = compare_logits(expected, found, case_of(expected), EXACT, Gates())
    assert (errors.decided, errors.top1_agreement, errors.raw_top1_agreement) == (1, 1.0, 0.5)
    assert judge(case_of(expected), expected, found, EXACT, Gates()).status == "passed"


def test_tolerance_grows_with_the_logits() -> None:
    """1e-4 of the largest logit passes in float32, twice that fails; small logits are taken as 1."""
    for scale, limit in ((100.0, 1e-2), (0.5, 1e-4)):
        expected = logits_of([scale, -scale / 2])
        for share, status in ((0.9, "passed"), (2.0, "failed")):
            found = expected + np.float32(share * limit)
            assert judge(case_of(expected), expected, found, EXACT, Gates()).status == status


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["reference", "onnx"])
def test_values_that_are_not_finite_fail(bad: float, side: str) -> None:
    """NaN or infinity on either side is no parity, even where both have it."""
    good, spoilt = logits_of([1.0, 2.0]), logits_of([1.0, bad])
    expected, found = (spoilt, spoilt) if side == "reference" else (good, spoilt)
    gates = Gates(max_abs_error=1e9, min_top1_agreement=0.0)
    assert judge(case_of(good), expected, found, EXACT, gates).status == "failed"


def test_gates_replace_the_defaults() -> None:
    """A wider gate lets pass what the tolerance refuses, a gate on agreement refuses a flipped token."""
    expected, found = logits_of([1.0, 2.0]), logits_of([1.0, 2.1])
    assert judge(case_of(expected), expected, found, EXACT, Gates()).status == "failed"
    assert judge(case_of(expected), expected, found, EXACT, Gates(max_abs_error=0.2)).status == "passed"
    flipped = logits_of([2.0, 1.9])
    wide = Gates(max_abs_error=0.99)  # below the margin of 1, so that the token is decided
    check = judge(case_of(expected), expected, flipped, EXACT, dataclasses.replace(wide, max_abs_error=0.999))
    assert check.status == "failed"
    assert "top-1" in check.why
    lenient = dataclasses.replace(wide, max_abs_error=1.0, min_top1_agreement=0.0)
    assert judge(case_of(expected), expected, flipped, EXACT, lenient).status == "passed"


def test_logits_of_another_shape_fail() -> None:
    """Another vocabulary is no parity."""
    expected, found = logits_of([1.0, 2.0]), logits_of([1.0, 2.0, 3.0])
    assert judge(case_of(expected), expected, found, EXACT, Gates()).status == "failed"


def test_left_padded_rows_differ_in_length() -> None:
    """Three rows of text of three lengths, the padding on the left, also from fewer and short windows."""
    for windows in (np.arange(96).reshape(2, 48), np.arange(3).reshape(1, 3)):
        case = left_padded(windows)
        lengths = case.real.sum(axis=1).tolist()
        assert len(set(lengths)) == 3
        assert max(lengths) == windows.shape[1]
        assert (np.diff(case.real.astype(int), axis=1) >= 0).all()
        assert case.ids[2].tolist() == windows[2 % len(windows)].tolist()


def test_cases_depend_on_what_the_graph_takes() -> None:
    """Without a cache there is no decode, without a mask no padding, and each is skipped with its reason."""
    windows = np.zeros((4, 48), np.int64)
    full, none_missing = parity_cases(windows, SimpleNamespace(cache=(1,), has_attention_mask=True))  # type: ignore[arg-type]
    assert [case.name for case in full] == ["parity-prefill", "parity-decode", "parity-padded"]
    assert not none_missing
    assert full[1].prefix == 24
    assert full[1].ids.shape[1] - 24 >= 16
    bare, missing = parity_cases(windows, SimpleNamespace(cache=(), has_attention_mask=False))  # type: ignore[arg-type]
    assert [case.name for case in bare] == ["parity-prefill"]
    assert {check.name: check.status for check in missing} == {
        "parity-decode": "skipped",
        "parity-padded": "skipped",
    }


def test_good_export_passes_everything(tmp_path: Path) -> None:
    """The plain toy passes all three ways of running, and its perplexity is the reference's."""
    report = report_of(tmp_path)
    assert set(statuses(report).values()) == {"passed", "skipped"}
    assert statuses(report)["perplexity-increase"] == "skipped"
    assert report.first_divergence is None
    assert report.perplexity["onnx"] == pytest.approx(report.perplexity["recovered"], rel=1e-5)  # float32
    assert report.timings["load_s"] > 0


@pytest.mark.parametrize("name", ["block.0.q", "block.1.down"])
def test_altered_weight_is_found_and_its_block_named(tmp_path: Path, name: str) -> None:
    """A weight that is not the reference's fails parity; its block is the first to diverge."""
    weights = random_weights()
    weights[name] = weights[name] * np.float32(1.5)
    report = report_of(tmp_path, weights)
    assert statuses(report)["parity-prefill"] == "failed"
    block = name.split(".")[1]
    assert report.first_divergence is not None
    assert report.first_divergence.startswith(f"block {block}: max |Δ|")
    if block == "1":
        assert "block 0 within" in report.first_divergence


def test_altered_head_is_found_after_the_last_block(tmp_path: Path) -> None:
    """When every block agrees the difference lies behind them."""
    weights = random_weights()
    weights["head"] = weights["head"] * np.float32(1.01)
    report = report_of(tmp_path, weights)
    assert report.first_divergence is not None
    assert report.first_divergence.startswith("after the last block")
    assert "blocks 0-1 within" in report.first_divergence


def test_nan_weight_fails_every_run(tmp_path: Path) -> None:
    """NaN fails finiteness, parity and perplexity alike: no comparison lets it slip."""
    weights = random_weights()
    weights["block.0.up"][0, 0] = np.nan
    report = report_of(tmp_path, weights)
    assert {check.name for check in report.failed_checks} == {
        "finite",
        "parity-prefill",
        "parity-decode",
        "parity-padded",
        "perplexity-drift",
    }


def test_broken_cache_is_found_by_decoding_only(tmp_path: Path) -> None:
    """Keys whose heads change places in the cache do not show in whole sequences."""
    found = statuses(report_of(tmp_path, options=GraphOptions(swap_key_heads=True)))
    assert found["parity-prefill"] == "passed"
    assert found["parity-decode"] == "failed"


def test_ignored_padding_is_found_by_the_padded_batch_only(tmp_path: Path) -> None:
    """A graph that attends to padding is right for everything but a padded batch."""
    found = statuses(report_of(tmp_path, options=GraphOptions(ignore_padding=True)))
    assert (found["parity-prefill"], found["parity-padded"]) == ("passed", "failed")


def test_float16_graph_is_judged_by_float16_tolerances(tmp_path: Path) -> None:
    """The cache's type chooses the tolerance; half precision would not pass the one of float32."""
    report = report_of(tmp_path, options=GraphOptions(dtype="float16"))
    assert report.compute_dtype == "float16"
    check = report.check("parity-prefill")
    assert check.status == "passed"
    assert check.measured is not None
    assert check.measured > EXACT.relative_error * check.details["scale"]


def test_pruned_weights_of_the_toy_are_half_zero() -> None:
    """The toy is what the other tests take it for."""
    weights = random_weights()
    assert {float((weights[name] == 0).mean()) for name in pruned_names()} == {0.5}
