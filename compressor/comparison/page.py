"""A comparison as one HTML page that needs nothing else: no network, no script, for screen, phone and paper."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compressor import report
from compressor.comparison import plots, protocol, table
from compressor.comparison.cells import target_label
from compressor.comparison.results import Comparison
from compressor.comparison.task_table import task_tables
from compressor.report import units
from compressor.report.svg import drawing
from compressor.report.tables import recipe_sections, settings

_MARKER_SIGNS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "p": "⬟"}


def render_page(comparison: Comparison) -> str:
    """The whole page. Equal comparisons give equal text."""
    folders = [Path(__file__).parent, *(Path(folder) for folder in report.__path__)]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=units.number, target=target_label)
    with drawing():
        drawings = {
            text: {
                "sparsity": [
                    (one.title, Markup(one.svg)) for one in plots.sparsity_drawings(comparison, text)
                ],
                "time": [(one.title, Markup(one.svg)) for one in plots.time_drawings(comparison, text)],
            }
            for text in comparison.texts
        }
    statuses = [cell.status for cell in comparison.cells]
    return environment.get_template("compare.html.j2").render(
        comparison=comparison,
        done=statuses.count("done"),
        failed=[cell for cell in comparison.cells if cell.failure is not None],
        missing=statuses.count("open"),
        dense=protocol.dense_sentence(comparison),
        drawings=drawings,
        legend=plots.legend(comparison),
        markers=[(_MARKER_SIGNS[sign], name) for name, sign in plots.pruner_markers(comparison).items()],
        tables=table.tables_of(comparison),
        task_tables=task_tables(comparison),
        protocol=protocol.protocol_lines(comparison),
        told=[
            (f"{cell.pruner} {target_label(cell.target)} {cell.method}", notice)
            for cell in comparison.cells
            if cell.figures is not None
            for notice in cell.figures.notices
        ],
        recipe=recipe_sections(comparison.recipe),
        calibration=list(settings(comparison.calibration.protocol)),
    )
