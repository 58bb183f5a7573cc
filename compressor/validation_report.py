"""The report of ``compress validate``: the same document as a run's, with what a validation knows."""

from __future__ import annotations

import os
from pathlib import Path

from compressor.errors import OutputRefused
from compressor.report.html import write_report
from compressor.report.schema import ModelFacts, Report, SizeFacts, SparsityFacts
from compressor.reporting import (
    bytes_by_encoding,
    installed_versions,
    load_facts,
    manifest_facts,
    onnx_bytes,
    perplexity_facts,
    stage_seconds,
    task_rows,
    validation_facts,
)
from compressor.validation import ValidationOutcome
from exporters.manifest import Manifest, read_manifest


def validation_document(outcome: ValidationOutcome) -> Report:
    """The report of a validation; what only the run could know comes from the run's report beside the file.

    Raises:
        ExportError: The manifest, which was right when it was validated, cannot be read.
    """
    found, recorded, plan = outcome.report, outcome.recorded, outcome.plan
    manifest = read_manifest(plan.manifest) if plan.manifest.is_file() else None
    source = outcome.reference or plan.onnx
    return Report(
        command="validate",
        output=plan.onnx.name,
        model=ModelFacts(name=source.name) if recorded is None else recorded.model,
        sparsity=SparsityFacts() if recorded is None else recorded.sparsity,
        perplexity=perplexity_facts(found.perplexity, outcome.evaluation),
        validation=validation_facts(found),
        tasks=task_rows(found),
        size=_size(outcome, manifest),
        versions=installed_versions(),
        load=load_facts(manifest, found),
        timings=stage_seconds(found),
        manifest=None if manifest is None else manifest_facts(manifest),
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


def _size(outcome: ValidationOutcome, manifest: Manifest | None) -> SizeFacts:
    """Sizes of the files that were validated; those of the model that went in come from the run's report."""
    recorded = outcome.recorded
    return SizeFacts(
        source_bytes=None if recorded is None else recorded.size.source_bytes,
        dense_bytes=None if recorded is None else recorded.size.dense_bytes,
        onnx_bytes=onnx_bytes(outcome.plan),
        by_encoding={} if manifest is None else bytes_by_encoding(manifest.tensors),
    )
