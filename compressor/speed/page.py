"""A measurement as one HTML page that needs nothing else: no network, no script, for screen, phone and paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compressor import comparison, report
from compressor.report import units
from compressor.report.svg import drawing
from compressor.speed import plots
from compressor.speed.table import protocol_lines, tables_of
from validators.speed.results import Speed


def render_page(speed: Speed, machine: dict[str, Any]) -> str:
    """The whole page. Equal measurements give equal text."""
    folders = [Path(folder) for package in (comparison, report) for folder in package.__path__]
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=units.byte_size)
    with drawing():
        batches = [
            (batch, Markup(plots.decode_plot(speed, batch)), Markup(plots.prefill_plot(speed, batch)))
            for batch in speed.workload.batches
        ]
        memory = plots.memory_plot(speed)
        files = Markup(plots.file_plot(speed))
    return environment.get_template("speed.html.j2").render(
        speed=speed,
        machine=machine,
        batches=batches,
        memory=None if memory is None else Markup(memory),
        files=files,
        tables=tables_of(speed),
        protocol=protocol_lines(speed),
    )
