"""A comparison in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.comparison.protocol import dense_sentence, protocol_lines
from compressor.comparison.results import Comparison
from compressor.comparison.table import TableText, tables_of
from compressor.comparison.task_table import task_tables


def markdown_text(comparison: Comparison) -> str:
    """The tables in Markdown, the best of each target in bold, the protocol below."""
    parts = [f"Dense model: {_plain(dense_sentence(comparison))}."]
    for table in tables_of(comparison):
        parts.append(
            "\n".join([*([f"### {_plain(table.name)}", ""] if table.name else []), *_markdown_lines(table)])
        )
        if table.settings:
            parts.append("\n".join(f"- {_plain(line)}" for line in table.settings))
    for table in task_tables(comparison):
        title = f"### {_plain(table.name)}: zero-shot tasks" if table.name else "### Zero-shot tasks"
        parts.append("\n".join([title, "", *_markdown_lines(table)]))
    parts.append("\n".join(f"- {_plain(line)}" for line in protocol_lines(comparison)))
    return "\n\n".join(parts) + "\n"


def _markdown_lines(table: TableText) -> list[str]:
    rule = ("---:" if right else "---" for right in table.figures)
    lines = [f"| {' | '.join(_escaped(table.columns))} |", f"|{'|'.join(rule)}|"]
    for place, row in enumerate(table.rows):
        words = _escaped(row)
        if place in table.best:
            words[table.best_column] = f"**{words[table.best_column]}**"
        lines.append(f"| {' | '.join(words)} |")
    return lines


def _escaped(words: Sequence[str]) -> list[str]:
    return [_plain(word.replace("\\", "\\\\").replace("|", "\\|")) for word in words]


def _plain(text: str) -> str:
    """On one line, and no HTML."""
    return " ".join(text.split("\n")).replace("<", "&lt;")
