"""The report of ``compress validate``: the same document as a run's, with what a validation knows."""

from __future__ import annotations

import os
from pathlib import Path

from compressor.errors import OutputRefused
from compressor.report.html import write_report
from compressor.report.schema import (
    ManifestFacts,
    ModelFacts,
    PerplexityFacts,
    Report,
    SizeFacts,
    SparsityFacts,
)
from compressor.reporting import installed_versions, load_facts, stage_seconds, validation_facts
from compressor.validation import ValidationOutcome
from validators.checks import PERPLEXITY_KEYS


def validation_document(outcome: ValidationOutcome) -> Report:
    """The report of a validation; what only the run could know comes from the run's report beside the file."""
    found, recorded = outcome.report, outcome.recorded
    measured = {key: found.perplexity.get(key) for key in PERPLEXITY_KEYS}
    protocol = None if outcome.evaluation is None else outcome.evaluation.facts()
    source = outcome.reference or outcome.plan.onnx
    return Report(
        command="validate",
        output=outcome.plan.onnx.name,
        model=ModelFacts(name=source.name) if recorded is None else recorded.model,
        sparsity=SparsityFacts() if recorded is None else recorded.sparsity,
        perplexity=PerplexityFacts(**measured, protocol=protocol),
        validation=validation_facts(found),
        size=_size(outcome),
        versions=installed_versions(),
        load=load_facts(None, found),
        timings=stage_seconds(found),
        manifest=_manifest(outcome),
        notices=(*found.notices, *outcome.notices),
    )


def report_paths(path: str | Path) -> tuple[Path, Path]:
    """Where the JSON and the HTML of a report go: ``path`` with the one ending and with the other.

    Raises:
        OutputRefused: The folder is missing or cannot be written, or one of the two is a folder.
    """
    given = Path(path)
    bare = given.with_suffix("") if given.suffix in (".json", ".html") else given
    pair = bare.with_name(f"{bare.name}.json"), bare.with_name(f"{bare.name}.html")
    if not os.path.isdir(given.parent):  # Path.is_dir raises for a name that is too long
        raise OutputRefused(
            "E-OUTPUT-PARENT",
            f"the folder {given.parent} for the report does not exist",
            f"create it: mkdir -p {given.parent}",
        )
    for one in pair:
        if os.path.isdir(one):
            raise OutputRefused("E-OUTPUT-KIND", f"{one} is a folder", "give another --report")
    probe = _draft(pair[0])
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_writable(pair[0], error) from None
    return pair


def _draft(path: Path) -> Path:
    """The name under which a report is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _not_writable(path: Path, error: OSError) -> OutputRefused:
    return OutputRefused(
        "E-OUTPUT-NOT-WRITABLE",
        f"cannot write the report {path}: {error.strerror or error}",
        "give a --report of another name, in a folder that you can write",
    )


def publish_report(report: Report, json_path: Path, html_path: Path) -> None:
    """Write both files beside their places, then put them there; an older report stays until then.

    Raises:
        OutputRefused: The folder cannot be written.
    """
    parts = [_draft(path) for path in (html_path, json_path)]
    try:
        write_report(report, parts[1], parts[0])
        for part, path in zip(parts, (html_path, json_path), strict=True):
            os.replace(part, path)
    except OSError as error:
        raise _not_writable(json_path, error) from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _size(outcome: ValidationOutcome) -> SizeFacts:
    plan, recorded = outcome.plan, outcome.recorded
    onnx_bytes = sum(path.stat().st_size for path in (plan.onnx, plan.data) if path.is_file())
    if recorded is None:
        return SizeFacts(onnx_bytes=onnx_bytes)
    return recorded.size.model_copy(update={"onnx_bytes": onnx_bytes})


def _manifest(outcome: ValidationOutcome) -> ManifestFacts | None:
    return None if outcome.recorded is None else outcome.recorded.manifest
