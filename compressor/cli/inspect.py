"""``compress inspect``: what is in an ONNX file, weight by weight, and what each encoding would cost."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from compressor.cli import options
from compressor.cli.sections import SectionedCommand

if TYPE_CHECKING:
    from exporters.inspect import Inspection, WeightRow

COLUMNS = (
    "weight",
    "ONNX shape",
    "type",
    "stored",
    "nnz",
    "sparsity",
    "N:M",
    "if dense",
    "if sparse",
    "(if bitmask)",
)
SHAPE_NOTE = "as the graph stores it, a linear's often (in, out); the report has PyTorch's (out, in)"
BITMASK_NOTE = "hypothetical, one bit per weight and the values kept: stock ONNX has no such form"
LEFT = 4  # columns of text, aligned to the left; the others are figures


@click.command("inspect", cls=SectionedCommand, short_help="List what an ONNX file holds, weight by weight.")
@click.argument("path", metavar="ONNX")
@options.talk_options
def command(path: str, as_json: bool, verbosity: int, quiet: bool) -> int:
    """List the weights of ONNX, a file or a folder with model.onnx: zeros, patterns, bytes by encoding."""
    from compressor.cli.session import open_session
    from compressor.cli.signals import stop_at_once

    with open_session("inspect", quiet=quiet, verbosity=verbosity) as session, stop_at_once():
        from compressor.cli.terminal import json_text
        from exporters.inspect import inspect_model

        file = Path(path)
        inspection = inspect_model(file / "model.onnx" if os.path.isdir(file) else file)
        if as_json:
            text = json_text(inspection.to_json())
        else:
            rows = [] if quiet else [_table(inspection), "", *_notes()]
            text = "\n".join([*rows, *_totals(inspection)])
        session.result(text)
    return 0


def _cells(row: WeightRow) -> tuple[str, ...]:
    from compressor.cli.terminal import printable
    from compressor.report.units import byte_size, percent

    sizes = [row.bytes_by_encoding.get(kind) for kind in ("dense", "sparse", "bitmask")]
    return (
        printable(row.name),
        "×".join(str(side) for side in row.shape),
        row.dtype,
        row.encoding,
        str(row.nnz),
        percent(row.sparsity, 2),
        row.pattern or "-",
        *("-" if size is None else byte_size(size) for size in sizes),
    )


def _natural(row: WeightRow) -> list[tuple[int, str]]:
    """Key that puts block 2 before block 10."""
    return [
        (int(part or 0), "") if place % 2 else (0, part)
        for place, part in enumerate(re.split(r"(\d+)", row.name))
    ]


def _table(inspection: Inspection) -> str:
    """The table: drawn to fit a terminal, plain columns anywhere else."""
    from compressor.cli.terminal import is_terminal

    rows = [_cells(row) for row in sorted(inspection.weights, key=_natural)]
    return _drawn(rows) if is_terminal(sys.stdout) else _plain(rows)


def _plain(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = []
    for cells in [COLUMNS, *rows]:
        aligned = [
            cell.ljust(width) if place < LEFT else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _drawn(rows: list[tuple[str, ...]]) -> str:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    table = Table(box=SIMPLE, pad_edge=False)
    for place, name in enumerate(COLUMNS):
        justify: Literal["left", "right"] = "left" if place < LEFT else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=place > 0)  # long names fold
    for cells in rows:
        table.add_row(*cells)
    with console.capture() as capture:
        console.print(table, markup=False)
    return capture.get().rstrip()


def _notes() -> list[str]:
    """What two columns of the table mean."""
    from compressor.cli.wording import labelled

    return [labelled("ONNX shape", SHAPE_NOTE), labelled("(if bitmask)", BITMASK_NOTE)]


def _totals(inspection: Inspection) -> list[str]:
    from compressor.cli.wording import labelled
    from compressor.report.units import byte_size, percent

    stored = inspection.tensors_by_encoding
    files = ", ".join(f"{name} {byte_size(size)}" for name, size in inspection.file_bytes.items())
    forms = ", ".join(
        f"{byte_size(size)} {kind}" if kind != "bitmask" else f"({byte_size(size)} {kind}, hypothetical)"
        for kind, size in inspection.bytes_by_encoding.items()
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in stored.items() if count)
    return [
        labelled("files", files),
        labelled(
            "weights",
            f"{len(inspection.weights)} ({kinds or 'none'}) · {percent(inspection.sparsity, 2)} zeros · "
            f"{byte_size(inspection.stored_bytes)} stored",
        ),
        labelled("if all were", forms),
        labelled("other tensors", f"{inspection.other_tensors} · {byte_size(inspection.other_bytes)}"),
    ]
