"""The report's JSON: its keys, what it refuses, and that it comes back as it went out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from report_samples import check_rows, fields, sample_report

from compressor.errors import InputRefused
from compressor.report.html import write_report
from compressor.report.schema import (
    SCHEMA_VERSION,
    CheckRow,
    ModelFacts,
    PerplexityFacts,
    Report,
    ValidationFacts,
    portable_name,
    read_report,
)


def keys_of(tree: object, prefix: str = "") -> set[str]:
    """Every dotted key of nested dicts; list items share their list's key."""
    if isinstance(tree, dict):
        deeper = (keys_of(value, f"{prefix}{key}.") for key, value in tree.items())
        return {f"{prefix}{key}" for key in tree}.union(*deeper)
    if isinstance(tree, list):
        return set().union(*(keys_of(item, prefix) for item in tree))
    return set()


def test_report_has_the_promised_keys() -> None:
    """Pipelines rely on these keys by name."""
    # fmt: off
    promised = {
        "schema_version", "command", "sparsity.target", "sparsity.measured", "sparsity.pattern",
        "perplexity.dense", "perplexity.pruned", "perplexity.recovered", "perplexity.onnx",
        "perplexity.protocol.window", "perplexity.protocol.stride", "perplexity.protocol.bos",
        "perplexity.protocol.join", "perplexity.protocol.dtype", "perplexity.protocol.sha256",
        "validation.passed", "validation.provider", "validation.first_divergence",
        "validation.checks.name", "validation.checks.status", "validation.checks.measured",
        "validation.checks.limit", "validation.checks.unit", "validation.checks.why",
        "validation.checks.details", "size.source_bytes",
        "size.dense_bytes", "size.onnx_bytes", "size.by_encoding.sparse.bytes", "blocks.index",
        "blocks.loss_before", "blocks.loss_after", "blocks.seconds", "weights.sparsity",
        "weights.encoding", "recipe.pruning.method", "learning_rate.chosen", "recovery", "device",
        "versions.blockpress", "timings.export", "peak_memory_bytes.host", "peak_memory_bytes.device",
        "manifest.digest", "manifest.files.sha256", "notices", "statement", "nonfinite", "model.revision",
        "calibration.sha256",
    }
    # fmt: on
    tree = json.loads(sample_report().to_json())
    assert promised - keys_of(tree) == set()
    assert tree["schema_version"] == SCHEMA_VERSION


def test_report_without_validation_keeps_its_keys_as_null() -> None:
    """A bare report says null for the verdict and the four perplexities instead of leaving them out."""
    tree = Report(command="export", output="dense.onnx", model=ModelFacts(name="tiny")).tree()
    assert tree["validation"]["passed"] is None
    assert {
        key: tree["perplexity"][key] for key in ("dense", "pruned", "recovered", "onnx")
    } == dict.fromkeys(("dense", "pruned", "recovered", "onnx"))


def test_report_round_trips_through_its_file(tmp_path: Path) -> None:
    """What is read back equals what was written."""
    report = sample_report(notices=("one expert saw no token: “mlp.experts[17]”",))
    write_report(report, tmp_path / "model.report.json")
    assert read_report(tmp_path / "model.report.json") == report


def test_report_json_is_the_same_each_time() -> None:
    """Equal reports give equal bytes, keys in the order of the schema."""
    first, second = sample_report().to_json(), sample_report().to_json()
    assert first == second
    assert list(json.loads(first)) == [*Report.model_fields, "nonfinite"]


def test_report_nonfinite_numbers_become_null_with_a_pointer(tmp_path: Path) -> None:
    """NaN and infinity leave valid JSON, are named by place, and come back when the report is read."""
    checks = (
        *check_rows()[:6],
        CheckRow(name="parity-decode", status="failed", measured=math.nan, limit=1e-3),
    )
    report = sample_report(
        perplexity=PerplexityFacts(dense=9.0, pruned=math.inf, recovered=12.0, onnx=math.nan),
        validation=ValidationFacts(passed=False, checks=checks),
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    tree = json.loads(report.to_json(), parse_constant=refuse)
    assert tree["perplexity"]["onnx"] is None
    assert tree["nonfinite"] == {
        "/perplexity/pruned": "Infinity",
        "/perplexity/onnx": "NaN",
        "/validation/checks/6/measured": "NaN",
    }
    again = Report.from_tree(tree)
    assert math.isnan(again.perplexity.onnx or 0.0)
    assert again.perplexity.pruned == math.inf


def test_report_nonfinite_pointer_escapes_slashes() -> None:
    """A key with a slash or a tilde is found again."""
    report = sample_report(timings={"read/write ~": math.nan})
    assert report.tree()["nonfinite"] == {"/timings/read~1write ~0": "NaN"}
    assert math.isnan(Report.from_tree(report.tree()).timings["read/write ~"])


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/someone/models/tiny-llm", "tiny-llm"),
        ("~/texts/calib.jsonl", "calib.jsonl"),
        ("C:\\texts\\calib.jsonl", "calib.jsonl"),
        ("../data/calib.jsonl", "../data/calib.jsonl"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("python-docs", "python-docs"),
    ],
)
def test_report_names_lose_the_machines_folders(source: str, shown: str) -> None:
    """Absolute paths shrink to their last part; hub ids and relative paths stay."""
    assert portable_name(source) == shown


def test_report_holds_no_absolute_path() -> None:
    """A model, a text or a recipe source given by absolute path appears by name alone."""
    recipe = {**fields()["recipe"], "calibration": {"source": "/home/someone/calib.jsonl", "num_samples": 4}}
    report = sample_report(
        model=ModelFacts(name="/home/someone/tiny"), output="/home/someone/sparse.onnx", recipe=recipe
    )
    assert "/home/someone" not in report.to_json()
    assert report.recipe is not None
    assert report.recipe["calibration"] == {"source": "calib.jsonl", "num_samples": 4}


@pytest.mark.parametrize(
    ("passed", "statuses"),
    [(True, ("passed", "failed")), (True, ("skipped",)), (True, ()), (None, ("failed",))],
)
def test_report_verdict_cannot_contradict_its_checks(passed: bool | None, statuses: tuple[str, ...]) -> None:
    """PASSED needs a passed check and no failed one; a failed check needs a verdict."""
    checks = [{"name": f"check-{place}", "status": status} for place, status in enumerate(statuses)]
    with pytest.raises(ValidationError):
        ValidationFacts.model_validate({"passed": passed, "checks": checks})


@pytest.mark.parametrize(
    ("text", "error_id"),
    [
        ("{", "E-REPORT-UNREADABLE"),
        ("[]", "E-REPORT-SCHEMA"),
        ('{"schema_version": 99}', "E-REPORT-SCHEMA"),
        ('{"schema_version": 1}', "E-REPORT-UNREADABLE"),
        ('{"schema_version": 1, "nonfinite": {"/perplexity/onnx": "NaN"}}', "E-REPORT-UNREADABLE"),
        ('{"schema_version": 1, "nonfinite": []}', "E-REPORT-UNREADABLE"),
        ("[" * 200_000, "E-REPORT-UNREADABLE"),
    ],
)
def test_report_that_is_broken_is_refused(tmp_path: Path, text: str, error_id: str) -> None:
    """A file that is no report of this schema is refused by id, naming the file."""
    path = tmp_path / "model.report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputRefused) as caught:
        read_report(path)
    assert caught.value.error_id == error_id
    assert "model.report.json" in caught.value.message


def test_report_that_is_absent_or_binary_is_refused(tmp_path: Path) -> None:
    """No file and a file that is not UTF-8 are both refused."""
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.json", "binary.json"):
        with pytest.raises(InputRefused, match="cannot be read"):
            read_report(tmp_path / name)


def test_report_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    """A key that the schema does not know is named, not dropped."""
    tree = sample_report().tree()
    tree["size"]["zipped_bytes"] = 3
    path = tmp_path / "model.report.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(InputRefused, match=r"size\.zipped_bytes"):
        read_report(path)
