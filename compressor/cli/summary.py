"""The results on stdout: perplexities and sizes, the checks that matter, the verdict, where the report is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.cli.tasks import task_table
from compressor.cli.terminal import bold_green, bold_red, bold_yellow, printable
from compressor.cli.wording import labelled
from compressor.report.units import MISSING, byte_size, duration, number, percent

VERSIONS = (
    ("dense", "dense"),
    ("pruned", "pruned only"),
    ("recovered", "recovered"),
    ("quantized", "quantised"),
    ("onnx", "ONNX Runtime"),
)
ONLY_WHEN_ASKED = {
    "pattern",
    "sparsity",
    "perplexity-increase",
}  # skipped by every run that sets no such limit
NOT_FASTER = (
    "Smaller on disk, not faster: stock ONNX Runtime expands sparse initializers when it loads the file."
)
NOT_SMALLER = (
    "Every weight is stored dense, as no sparse form would be smaller: the zeros save no space on disk, and "
    "stock ONNX Runtime does not run faster for them."
)


PACKED = "Smaller on disk and in memory: packed weights stay packed. Without the blockpress-runtime library it is slow."
SMALLER = "Smaller on disk and in memory, and fewer operations: heads and neurons are gone, not set to zero."


def verdict(passed: bool | None) -> str:
    """PASSED, FAILED or NOT VALIDATED, in colour where stdout shows colours."""
    if passed is None:
        return bold_yellow("NOT VALIDATED", sys.stdout)
    return bold_green("PASSED", sys.stdout) if passed else bold_red("FAILED", sys.stdout)


def result_text(report: Mapping[str, Any], out: Path, html_path: Path, *, as_json: bool, quiet: bool) -> str:
    """What ``run`` and ``export`` print on stdout: the report document itself, or a summary of it."""
    if as_json:
        return json.dumps(report, indent=1, ensure_ascii=False)
    return summarise_output(report, out, html_path, quiet=quiet)


def summarise_output(report: Mapping[str, Any], out: Path, report_path: Path, *, quiet: bool) -> str:
    """What a run or an export has to say at its end.

    Args:
        report: The content of the report file.
        out: The ONNX file.
        report_path: The HTML report.
        quiet: The verdict and failed checks alone.
    """
    validation = report["validation"]
    ending = [*_check_lines(validation["checks"], failures_only=True), _verdict_line(report, out)]
    if quiet:
        return "\n".join(ending)
    if validation.get("first_divergence"):
        ending.insert(-1, labelled("diverges", validation["first_divergence"]))
    skipped = [
        check
        for check in validation["checks"]
        if check["status"] == "skipped" and check["name"] not in ONLY_WHEN_ASKED
    ]
    return "\n".join(
        [
            *_perplexity_table(report),
            "",
            *_check_lines(skipped),
            *ending,
            labelled("report", shown_path(report_path)),
            *_load_lines(report),
            _size_sentence(report),
        ]
    )


def summarise_validation(
    report: Mapping[str, Any], path: Path, report_path: Path | None, *, quiet: bool
) -> str:
    """The table of checks, the perplexities and the verdict of ``compress validate``.

    Args:
        report: The content of the validation's report.
        path: The file that was judged.
        report_path: The HTML report, where one was written.
        quiet: The verdict and failed checks alone.
    """
    validation = report["validation"]
    ran = f" · ran on {validation['provider']}" if validation.get("provider") else ""
    done = _verdict_line(report, path) + ran
    if quiet:
        return "\n".join([*_check_lines(validation["checks"], failures_only=True), done])
    lines = _check_lines(validation["checks"])
    if any(report["perplexity"].get(key) is not None for key, _ in VERSIONS):
        lines += ["", *_perplexity_table(report)]
    if report.get("tasks"):
        lines += ["", *task_table(report["tasks"])]
    lines.append("")
    if validation.get("first_divergence"):
        lines.append(labelled("diverges", validation["first_divergence"]))
    lines.append(done)
    if report_path is not None:
        lines.append(labelled("report", shown_path(report_path)))
    return "\n".join(lines)


def shown_path(path: Path) -> str:
    """The path as seen from the current folder where it lies inside, absolute elsewhere."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _perplexity_table(report: Mapping[str, Any]) -> list[str]:
    size = report["size"]
    dense_bytes, onnx_bytes = size.get("dense_bytes"), size.get("onnx_bytes")
    sizes = {"dense": byte_size(dense_bytes), "onnx": byte_size(onnx_bytes)}
    if dense_bytes and onnx_bytes:
        sizes["onnx"] += f"  ({percent(onnx_bytes / dense_bytes, 0)})"
    lines = [f"{'':<17}{'perplexity':>12}   {'size':>10}"]
    for key, label in VERSIONS:
        value = report["nonfinite"].get(f"/perplexity/{key}") if "nonfinite" in report else None
        if key == "quantized" and report["perplexity"].get(key) is None and not value:
            continue
        value = value or _perplexity(report["perplexity"].get(key))
        amount, _, share = sizes.get(key, "").partition("  ")
        lines.append(f"  {label:<15}{value:>12}   {amount:>10}  {share}".rstrip())
    return lines


def _perplexity(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.2f}" if value < 1e4 else number(value)


def _check_lines(checks: Sequence[Mapping[str, Any]], *, failures_only: bool = False) -> list[str]:
    """One aligned line per check: name, status, measured against limit, why."""
    lines = []
    for check in checks:
        if failures_only and check["status"] != "failed":
            continue
        status = check["status"]
        if status == "failed":
            status = bold_red(status, sys.stdout)
        facts = _measured(check)
        why = printable(check.get("why") or "")
        text = " · ".join(part for part in (facts, why) if part)
        lines.append(f"{check['name']:<21}{status}{' ' * (9 - len(check['status']))}{text}".rstrip())
    return lines


def _measured(check: Mapping[str, Any]) -> str:
    if check.get("measured") is None:
        return ""
    unit = f" {check['unit']}" if check.get("unit") else ""
    limit = f", limit {number(check['limit'])}" if check.get("limit") is not None else ""
    return f"{number(check['measured'])}{unit}{limit}"


def _verdict_line(report: Mapping[str, Any], out: Path) -> str:
    validation = report["validation"]
    statuses = [check["status"] for check in validation["checks"]]
    parts = [shown_path(out)]
    measured = report["sparsity"].get("measured")
    if measured is not None:
        structured = report["sparsity"].get("structured")
        fact = "of the blocks' weights are gone" if structured else "of the pruned weights are zero"
        parts.append(f"{percent(measured, 2)} {fact}")
    counts = {
        status: statuses.count(status) for status in ("passed", "failed", "skipped") if status in statuses
    }
    for place, (status, number_of) in enumerate(counts.items()):
        noun = "" if place else " check" if number_of == 1 else " checks"
        parts.append(f"{number_of}{noun} {status}")
    return f"{verdict(validation['passed'])}  {' · '.join(parts)}"


def _load_lines(report: Mapping[str, Any]) -> list[str]:
    """What loading the file cost ONNX Runtime, where it was loaded."""
    load = report.get("load") or {}
    if load.get("seconds") is None or load.get("resident_bytes") is None:
        return []
    cost = f"{duration(load['seconds'])}, {byte_size(load['resident_bytes'])} resident"
    return [labelled("load", f"{cost} in ONNX Runtime")]


def _size_sentence(report: Mapping[str, Any]) -> str:
    if report["sparsity"].get("structured"):
        return SMALLER
    if "packed" in report["size"].get("by_encoding", {}):
        return PACKED
    stored_sparse = any(name != "dense" for name in report["size"].get("by_encoding", {}))
    return NOT_FASTER if stored_sparse else NOT_SMALLER
