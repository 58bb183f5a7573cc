"""``compress compare``: pruners, recoveries and sparsities side by side on one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from compressor.cli import options
from compressor.cli.run import GATE_FAILED
from compressor.cli.sections import SectionedCommand
from compressor.cli.tasks import task_options
from compressor.cli.values import bytes_of, sparsity
from compressor.errors import UsageError

if TYPE_CHECKING:
    from compressor.comparing import ComparisonResult
    from compressor.comparison.grid import Grid
    from compressor.recipe import EvaluationRecipe

GRID = "Grid (without any of these: --preset quick)"
LISTS = ("pruners", "recoveries", "sparsities", "patterns")


def names(value: str) -> tuple[str, ...]:
    """The names between commas.

    Raises:
        click.BadParameter: One is empty.
    """
    found = tuple(name.strip() for name in value.split(","))
    if not all(found):
        raise click.BadParameter(f"{value!r} has an empty name between its commas")
    return found


def shares(value: str) -> tuple[float, ...]:
    """Shares such as ``0.5,0.7``, or percentages such as ``50%,70%``.

    Raises:
        UsageError: One is no number, or not between 0 and 1.
    """
    return tuple(
        sparsity(str(float(part[:-1]) / 100)) if _is_percentage(part) else sparsity(part)
        for part in (piece.strip() for piece in value.split(","))
    )


def _is_percentage(text: str) -> bool:
    return text.endswith("%") and text[:-1].replace(".", "", 1).strip().isdigit()


@click.command(
    "compare",
    cls=SectionedCommand,
    short_help="Measure many pruners and recoveries on a model, side by side.",
)
@click.argument("model")
@options.flag("Output", "--out", required=True, metavar="FOLDER", help="A new folder, or one to go on in.")
@options.flag("Output", "--force", is_flag=True, help="Start over; forget what was measured before.")
@options.flag("Output", "--markdown", is_flag=True, help="Print the tables in Markdown.")
@options.flag(
    GRID, "--preset", metavar="NAME", help="A built-in grid: quick, or paper for the tables of EBFT's paper."
)
@options.flag(GRID, "--grid", metavar="FILE", help="A grid in YAML: tables, variants, settings.")
@options.flag(GRID, "--pruners", type=names, metavar="A,B", help="Such as magnitude,wanda,sparsegpt.")
@options.flag(GRID, "--recoveries", type=names, metavar="A,B", help="Such as none,ebft.")
@options.flag(GRID, "--sparsities", type=shares, metavar="A,B", help="Shares of zeros, such as 0.5,0.7.")
@options.flag(GRID, "--patterns", type=names, metavar="A,B", help="N of M kept, such as 2:4,4:8.")
@options.flag(
    GRID,
    "--masks",
    type=click.Choice(["shared", "own"]),
    help="shared: all recoveries start from one pruned model (default); own: each prunes along, as compress run.",
)
@options.recipe_options
@options.settings(options.CALIBRATION)
@options.flag(
    "Evaluation",
    "--eval-data",
    "texts",
    multiple=True,
    metavar="SOURCE",
    help="What perplexity is measured on: python-docs, a file, or a dataset id. Repeatable.",
)
@options.flag(
    "Evaluation", "--max-eval-windows", type=int, help="Measure on at most this many windows of each."
)
@task_options
@options.device_option
@options.model_options
@options.flag(
    "Other",
    "--share-disk",
    "shared_bytes",
    type=bytes_of,
    default="20GiB",
    show_default=True,
    metavar="SIZE",
    help="Disk for the dense model's activations, computed once for all cells; 0 computes them in each.",
)
@options.talk_options
def command(
    model: str,
    out: str,
    force: bool,
    markdown: bool,
    recipe: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    overrides: dict[str, Any],
    texts: tuple[str, ...],
    max_eval_windows: int | None,
    as_json: bool,
    verbosity: int,
    quiet: bool,
    **choices: Any,
) -> int:
    """Measure every cell of a grid on MODEL: pruners, recoveries and sparsities side by side.

    MODEL is a Hugging Face folder or a hub id. Each cell is one pass of compress run without the export; the same
    command again goes on where it ended. Results: compare.json, compare.csv, compare.md and compare.html in FOLDER.
    """
    from compressor.cli.session import open_session
    from compressor.cli.signals import stop_between_blocks
    from compressor.run.lock import hold_output
    from compressor.run.output import name_output

    grid_choices = {name: choices.pop(name) for name in ("grid", *LISTS)}
    grid_choices["preset"] = choices["preset"]
    if max_eval_windows is not None:
        overrides["evaluation.max_windows"] = max_eval_windows
    with open_session("compare", quiet=quiet, verbosity=verbosity) as session:
        settings = options.recipe_overrides(assignments, overrides, seed)
        lock = hold_output(name_output(out).folder / "compare.json")
        with stop_between_blocks(session.display.line) as stop, lock:
            from compressor.comparing import compare  # loads torch, so after the lock

            result = compare(
                model,
                out,
                _grid(grid_choices, recipe, settings),
                recipe=recipe,
                overrides=settings,
                evaluations=_evaluations(texts, settings),
                force=force,
                stop=stop,
                progress=session.progress,
                **choices,
            )
        session.result(
            _text(result, as_json=as_json, markdown=markdown, quiet=quiet), result.comparison.notices
        )
    return exit_code(result)


def exit_code(result: ComparisonResult) -> int:
    """0 where every cell was measured, 4 where some failed, the first failure's own code where all did."""
    if not result.failed:
        return 0
    if len(result.failed) < len(result.comparison.cells):
        return GATE_FAILED
    failure = result.failed[0].failure
    assert failure is not None
    return failure.exit_code


def _grid(choices: dict[str, Any], recipe: str | None, settings: dict[str, Any]) -> Grid | None:
    """The grid of a file or of lists; None for a preset.

    Raises:
        UsageError: E-GRID-TWICE: more than one of them is given.
    """
    from compressor.comparison.grid import parse_grid, read_grid

    lists = {name: list(choices[name]) for name in LISTS if choices[name]}
    given = [f"--{name}" for name in ("preset", "grid") if choices[name]] + [f"--{name}" for name in lists][
        :1
    ]
    if len(given) > 1:
        raise UsageError("E-GRID-TWICE", f"{' and '.join(given)} exclude each other", "give one of them")
    if choices["grid"]:
        return read_grid(choices["grid"])
    return parse_grid(_whole(lists, recipe, settings), "the options") if lists else None


def _whole(lists: dict[str, Any], recipe: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The lists, and what the recipe says for those that are not given."""
    from compressor.recipe_file import read_recipe

    base = read_recipe(recipe, settings)
    whole = {
        "pruners": [base.pruning.method],
        "recoveries": list(dict.fromkeys(["none", base.recovery.method])),
        **lists,
    }
    if not lists.keys() & {"sparsities", "patterns"}:
        whole["sparsities"] = [0.5]
    return whole


def _evaluations(texts: Sequence[str], settings: dict[str, Any]) -> list[EvaluationRecipe]:
    """One section of the recipe for each text, with what else is set of it."""
    from compressor.recipe_file import read_overrides

    common = {key: value for key, value in settings.items() if key.startswith("evaluation.")}
    return [read_overrides({**common, "evaluation.source": text}).evaluation for text in texts]


def _text(result: ComparisonResult, *, as_json: bool, markdown: bool, quiet: bool) -> str:
    """What is printed on stdout: the document, the tables in Markdown, or the tables as they fit the stream."""
    from compressor.cli.summary import shown_path
    from compressor.cli.table_lines import table_lines, task_lines
    from compressor.cli.terminal import json_text
    from compressor.cli.wording import labelled
    from compressor.comparison.cells import target_label
    from compressor.comparison.markdown import markdown_text
    from compressor.comparison.protocol import dense_sentence, protocol_lines
    from compressor.comparison.table import tables_of
    from compressor.comparison.task_table import task_tables

    comparison = result.comparison
    if as_json:
        return json_text(comparison.tree())
    if markdown:
        return markdown_text(comparison).rstrip()
    lines = [] if quiet else [f"dense model: {dense_sentence(comparison)}", ""]
    for table in () if quiet else tables_of(comparison):
        lines += [*([table.name] if table.name else []), *table_lines(table), ""]
    for table in () if quiet else task_tables(comparison):
        lines += [f"{table.name}: zero-shot tasks" if table.name else "zero-shot tasks"]
        lines += [*task_lines(table), ""]
    for cell in result.failed:
        assert cell.failure is not None
        place = f"{cell.pruner} {target_label(cell.target)} {cell.method}"
        lines.append(labelled("failed", f"{place}: {cell.failure.error_id}, {cell.failure.message}"))
    if not quiet:
        lines += [labelled("note", line) for line in protocol_lines(comparison)]
    done = sum(cell.status == "done" for cell in comparison.cells)
    lines.append(labelled("measured", f"{done} of {len(comparison.cells)} cells"))
    lines.append(labelled("page", shown_path(result.folder / "compare.html")))
    return "\n".join(lines)
