"""Tables of several comparisons side by side, one model per folder, in Markdown: what docs/methods.md shows.

Each argument is NAME=FOLDER, a folder that `compress compare --out` wrote with one and the same grid. A cell holds the
models' figures in the order of the arguments; "-" where a cell failed or was not measured.

    python bench/method_tables.py stories260K=out/s-methods tiny-llm=out/t-methods
    python bench/method_tables.py stories260K=out/s-structured tiny-llm=out/t-structured --show seconds
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

Figures = Mapping[str, Any]
Row = tuple[str, str, str]  # pruner, recovery, variant


def _perplexity(figures: Figures) -> str:
    (text,) = figures["perplexity"].values()
    return f"{text['recovered']:.4g}" if text["recovered"] < 1000 else f"{text['recovered']:.0f}"


def _seconds(figures: Figures) -> str:
    seconds = figures["seconds"]
    return f"{(seconds['recovery'] or 0) + (seconds['finish'] or 0):.1f}"


def _losses(figures: Figures) -> str:
    """Calibration and held out, of the last stage."""
    losses = figures["finish"] or figures["losses"]
    return f"{losses['calibration']:.4f}, {losses['heldout']:.4f}" if losses else "none"


SHOWN: Mapping[str, Callable[[Figures], str]] = {
    "perplexity": _perplexity,
    "seconds": _seconds,
    "losses": _losses,
    "sparsity": lambda figures: f"{100 * figures['sparsity']:.2f} %",
}


class Comparison:
    """The finished cells of one folder, by table, row and target."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        content = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
        self.order = [(cell["table"], self._row(cell), cell["target"]) for cell in content["cells"]]
        self.done = {
            (cell["table"], self._row(cell), cell["target"]): cell["figures"]
            for cell in content["cells"]
            if cell["status"] == "done"
        }
        dense = [figures["perplexity"] for figures in self.done.values()]
        self.dense = [text["dense"] for text in (dense[0].values() if dense else ())]

    @staticmethod
    def _row(cell: Mapping[str, Any]) -> Row:
        return cell["pruner"], cell["recovery"], cell["variant"]


def tables(comparisons: Sequence[Comparison], show: str) -> Iterator[str]:
    """Markdown of every table of the grid."""
    order = list(dict.fromkeys(place for comparison in comparisons for place in comparison.order))
    for table in dict.fromkeys(place[0] for place in order):
        rows = list(dict.fromkeys(row for name, row, _ in order if name == table))
        targets = list(dict.fromkeys(target for name, _, target in order if name == table))
        with_variants = any(row[2] for row in rows)
        heads = ["pruner", "recovery", *(["variant"] if with_variants else []), *map(_target, targets)]
        lines = [f"**{table}**", "", _line(heads), "|" + "---|" * len(heads)]
        for row in rows:
            cells = [
                " / ".join(_cell(comparison, (table, row, target), show) for comparison in comparisons)
                for target in targets
            ]
            lines.append(_line([*(row if with_variants else row[:2]), *cells]))
        yield "\n".join(lines)


def _cell(comparison: Comparison, place: tuple[str, Row, str], show: str) -> str:
    figures = comparison.done.get(place)
    return "-" if figures is None else SHOWN[show](figures)


def _target(target: str) -> str:
    return target if ":" in target else f"{100 * float(target):g} %"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, required=True)
@click.option("--show", type=click.Choice(list(SHOWN)), default="perplexity", help="Which figure.")
def main(folders: Sequence[str], show: str) -> None:
    comparisons = [Comparison(name, Path(path)) for name, _, path in (one.partition("=") for one in folders)]
    for comparison in comparisons:
        dense = ", ".join(f"{value:.4g}" for value in comparison.dense)
        click.echo(f"{comparison.name}: dense {dense}, {len(comparison.done)} cells")
    for table in tables(comparisons, show):
        click.echo(f"\n{table}")


if __name__ == "__main__":
    main()
