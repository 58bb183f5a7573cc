"""The report as one HTML page that needs nothing else: no network, no script, for screen, phone and paper."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compressor.report import plots, summary, tables, units
from compressor.report.schema import Report
from compressor.report.svg import drawing


def write_report(report: Report, json_path: str | Path, html_path: str | Path | None = None) -> None:
    """Write the JSON and, where a path is given, the HTML page; both UTF-8, both replaced when they exist.

    The caller publishes: this writes in place, so the paths should lie in a folder that nobody reads yet.
    """
    Path(json_path).write_bytes(report.to_json().encode())
    if html_path is not None:
        Path(html_path).write_bytes(render_html(report).encode())


def render_html(report: Report) -> str:
    """The whole page. Equal reports give equal text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=units.number,
        measure=units.measure,
        bytes=units.byte_size,
        percent=units.percent,
        score=units.score,
        duration=units.duration,
    )
    with drawing():
        drawings = {
            "perplexity": plots.perplexity_plot(report.perplexity),
            "losses": plots.loss_plot(report.blocks),
            "sparsity": plots.sparsity_plot(tables.sparsity_table(report.weights)),
            "sizes": plots.size_plot(report.size),
        }
    return environment.get_template("report.html.j2").render(
        report=report,
        title=summary.title(report),
        verdict=summary.verdict(report),
        failed=[check for check in report.validation.checks if check.status == "failed"],
        figures=summary.key_figures(report),
        drawings={name: Markup(drawn) if drawn else None for name, drawn in drawings.items()},
        checks=[(check, summary.CHECK_MEANINGS.get(check.name, "")) for check in report.validation.checks],
        protocol=summary.protocol(report),
        load=summary.load(report),
        loss_summary=summary.loss_summary(report),
        sparsity_summary=summary.sparsity_summary(report),
        block_targets=summary.block_targets(report),
        learning_rate=summary.learning_rate(report),
        finetuning=summary.finetuning(report),
        model=summary.model(report),
        weights=tables.weight_rows(report.weights),
        weights_one_by_one=len(report.weights) <= tables.MAX_WEIGHT_ROWS,
        has_experts=any(tables.is_expert(row.name) for row in report.weights),
        encodings=tables.encodings(report),
        recipe=tables.recipe_sections(report.recipe or {}),
        calibration=list(tables.settings(report.calibration.protocol)) if report.calibration else [],
    )
