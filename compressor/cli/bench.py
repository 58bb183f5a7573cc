"""``compress bench``: how fast a model runs here, what memory it takes, and against which dense rivals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from compressor.cli import options
from compressor.cli.sections import SectionedCommand
from compressor.errors import OutputRefused

if TYPE_CHECKING:
    from compressor.benchmarking import BenchResult
    from compressor.speed.table import SpeedTable

FORMS = ("float32", "int8", "int4")
BASELINES, WORKLOAD = "Baselines", "What is measured"


def forms(value: str) -> tuple[str, ...]:
    """The forms between commas; ``none`` is none of them.

    Raises:
        click.BadParameter: One is unknown.
    """
    found = tuple(name.strip() for name in value.split(","))
    if found == ("none",):
        return ()
    unknown = [name for name in found if name not in FORMS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(FORMS)}, none")
    return found


@click.command(
    "bench",
    cls=SectionedCommand,
    short_help="Measure speed and memory against dense float32, int8 and 4-bit.",
)
@click.argument("models", metavar="ONNX", nargs=-1, required=True)
@options.flag(
    BASELINES,
    "--baseline",
    "baselines",
    multiple=True,
    metavar="ONNX",
    help="A dense rival that is there already; it takes the place of the one of its form. Repeatable.",
)
@options.flag(
    BASELINES,
    "--make",
    type=forms,
    default=",".join(FORMS),
    show_default=True,
    metavar="A,B",
    help="Rivals to make from the first ONNX: float32, int8 (dynamic), int4 (MatMulNBits); none.",
)
@options.flag(BASELINES, "--keep-baselines", metavar="FOLDER", help="Leave those that were made in FOLDER.")
@options.flag(
    WORKLOAD, "--prompt-tokens", type=int, default=128, show_default=True, help="Tokens of the prefill."
)
@options.flag(
    WORKLOAD, "--decode-tokens", type=int, default=16, show_default=True, help="Tokens decoded in a round."
)
@options.flag(
    WORKLOAD,
    "--batch",
    "batches",
    type=int,
    multiple=True,
    default=(1,),
    show_default=True,
    help="Sequences at once. Repeatable.",
)
@options.flag(WORKLOAD, "--threads", type=int, help="Threads of ONNX Runtime; all usable cores by default.")
@options.flag(WORKLOAD, "--rounds", type=int, default=7, show_default=True, help="Turns of every model.")
@options.flag(WORKLOAD, "--loads", type=int, default=3, show_default=True, help="Loads of every model.")
@options.flag(WORKLOAD, "--seed", type=int, default=0, show_default=True, help="Of the random tokens.")
@options.flag(
    WORKLOAD,
    "--require-library",
    is_flag=True,
    help="Fail where packed weights would run without the operator library.",
)
@options.flag("Other", "--html", "html_path", metavar="FILE", help="Write a page with tables and drawings.")
@options.talk_options
def command(
    models: tuple[str, ...],
    baselines: tuple[str, ...],
    make: tuple[str, ...],
    keep_baselines: str | None,
    prompt_tokens: int,
    decode_tokens: int,
    batches: tuple[int, ...],
    threads: int | None,
    rounds: int,
    loads: int,
    seed: int,
    require_library: bool,
    html_path: str | None,
    as_json: bool,
    verbosity: int,
    quiet: bool,
) -> int:
    """Measure ONNX, one or more exported language models: tokens per second, memory, loading, file size.

    Each is a file, a folder with model.onnx, or NAME= and one of these. All models take turns, each in a process of
    its own. On a machine with other work, trust the ratios only.
    """
    from compressor.cli.session import open_session
    from compressor.cli.signals import stop_at_once

    with open_session("bench", quiet=quiet, verbosity=verbosity) as session, stop_at_once():
        page = None if html_path is None else _page_path(html_path)
        from compressor.benchmarking import bench
        from validators.speed.workload import Workload, usable_cores

        workload = Workload(
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            batches=tuple(dict.fromkeys(batches)),
            threads=usable_cores() if threads is None else threads,
            rounds=rounds,
            loads=loads,
            seed=seed,
        )
        result = bench(
            models,
            baselines,
            make=make,
            workload=workload,
            keep_baselines=keep_baselines,
            require_library=require_library,
            progress=session.progress,
        )
        if page is not None:
            _write_page(page, result)
        session.result(_text(result, page, as_json=as_json, quiet=quiet), result.speed.notices)
    return 0


def _page_path(html_path: str) -> Path:
    """Where the page goes, checked before hours of measuring.

    Raises:
        OutputRefused: E-OUTPUT-PARENT, E-OUTPUT-KIND.
    """
    page = Path(html_path)
    if not page.parent.is_dir():
        raise OutputRefused(
            "E-OUTPUT-PARENT",
            f"the folder {page.parent} for the page does not exist",
            f"create it: mkdir -p {page.parent}",
        )
    if page.is_dir():
        raise OutputRefused("E-OUTPUT-KIND", f"{page} is a folder", "give another --html")
    return page


def _write_page(page: Path, result: BenchResult) -> None:
    from compressor.run.atomic import replace_file
    from compressor.speed.page import render_page

    try:
        replace_file(page, render_page(result.speed, result.machine).encode())
    except OSError as error:
        raise OutputRefused(
            "E-OUTPUT-NOT-WRITABLE",
            f"cannot write the page {page}: {error.strerror or error}",
            "give an --html that you can write",
        ) from None


def _text(result: BenchResult, page: Path | None, *, as_json: bool, quiet: bool) -> str:
    """What is printed on stdout: the document, or the tables."""
    from compressor.cli.summary import shown_path
    from compressor.cli.wording import labelled
    from compressor.speed.table import protocol_lines, tables_of

    if as_json:
        return json.dumps(result.tree(), indent=1, ensure_ascii=False)
    lines = []
    for table in tables_of(result.speed):
        lines += [table.title, *_table_lines(table), ""]
    if not quiet:
        lines += [labelled("note", line) for line in protocol_lines(result.speed)]
    lines.append(labelled("machine", f"{result.machine['processor']}, load {result.machine['load_average']}"))
    if page is not None:
        lines.append(labelled("page", shown_path(page)))
    return "\n".join(lines)


def _table_lines(table: SpeedTable) -> list[str]:
    """Drawn to fit a terminal, plain columns anywhere else."""
    from compressor.cli.terminal import is_terminal, printable

    if is_terminal(sys.stdout):
        return _drawn(table)
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    return [
        printable(
            "  ".join(
                word.rjust(width) if place else word.ljust(width)
                for place, (word, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
        for row in (table.columns, *table.rows)
    ]


def _drawn(table: SpeedTable) -> list[str]:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from compressor.cli.terminal import printable

    console = Console(file=sys.stdout, highlight=False)
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, column in enumerate(table.columns):
        justify: Literal["left", "right"] = "right" if place else "left"
        drawn.add_column(Text(printable(column)), justify=justify, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(printable(word)) for word in row))
    with console.capture() as capture:
        console.print(drawn)
    return capture.get().rstrip().splitlines()
