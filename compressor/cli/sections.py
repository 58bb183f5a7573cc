"""A command whose help lists its options under headings."""

from __future__ import annotations

from typing import Any

import click


class SectionedOption(click.Option):
    """An option that knows its heading."""

    def __init__(self, *declarations: Any, section: str = "Options", **attributes: Any) -> None:
        super().__init__(*declarations, **attributes)
        self.section = section


class SectionedCommand(click.Command):
    """A command that prints one table of options per heading, in order of appearance."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the tables."""
        tables: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                tables.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for heading, rows in tables.items():
            with formatter.section(heading):
                formatter.write_dl(rows)
