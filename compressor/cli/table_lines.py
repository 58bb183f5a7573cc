"""A comparison's tables as lines: drawn on a terminal, plain columns anywhere else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from compressor.cli.terminal import is_terminal, printable
from compressor.comparison.table import TableText, plain_lines

if TYPE_CHECKING:
    from rich.console import Console


def table_lines(table: TableText) -> list[str]:
    """Drawn to fit a terminal, plain columns anywhere else."""
    return _drawn(table) if is_terminal(sys.stdout) else [printable(line) for line in plain_lines(table)]


def task_lines(table: TableText) -> list[str]:
    """The same for a table whose columns all count: on a terminal in as many pieces as its width asks for."""
    if not is_terminal(sys.stdout):
        return table_lines(table)
    return [line for part in table.parts(_console().width) for line in _drawn(part)]


def _console() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


def _drawn(table: TableText) -> list[str]:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    console = _console()
    table = table.narrowed(console.width)
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column, figure in zip(table.columns, table.figures, strict=True):
        drawn.add_column(Text(printable(column)), justify="right" if figure else "left", overflow="fold")
    for place, row in enumerate(table.rows):
        best = place in table.best
        words = [
            Text(printable(word), style="bold green" if best and at == table.best_column else "")
            for at, word in enumerate(row)
        ]
        last = place + 1 == len(table.rows)
        drawn.add_row(*words, end_section=not last and table.rows[place + 1][0] != row[0])
    with console.capture() as capture:
        console.print(drawn)
    return capture.get().rstrip().splitlines()
