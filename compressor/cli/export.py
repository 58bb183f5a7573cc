"""``compress export``: the same export without pruning."""

from __future__ import annotations

from typing import Any

import click

from compressor.cli import options
from compressor.cli.run import GATE_FAILED
from compressor.cli.sections import SectionedCommand


@click.command(
    "export", cls=SectionedCommand, short_help="Export a model without pruning it; zeros it has are kept."
)
@click.argument("model")
@options.output_options
@options.recipe_options
@options.settings(options.EVALUATION, options.EVALUATION_DATASET, options.EXPORT, options.GATES)
@options.device_option
@options.model_options
@options.no_validate_option
@options.validation_options
@options.talk_options
def command(
    model: str,
    out: str,
    force: bool,
    recipe: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    overrides: dict[str, Any],
    as_json: bool,
    verbosity: int,
    quiet: bool,
    no_validate: bool,
    **choices: Any,
) -> int:
    """Export MODEL as it is: a dense baseline, or a model pruned elsewhere, whose zeros are found and kept.

    MODEL is a Hugging Face folder or a hub id.
    """
    from compressor.cli.session import open_session
    from compressor.cli.signals import stop_at_once
    from compressor.cli.summary import result_text
    from compressor.run.output import reserve_output

    with open_session("export", quiet=quiet, verbosity=verbosity) as session:
        settings = options.recipe_overrides(assignments, overrides, seed)
        from compressor.recipe_file import read_recipe

        chosen = read_recipe(recipe, settings)
        with stop_at_once(), reserve_output(out, force, model=model):
            from compressor.exporting import export  # loads torch, so after the lock

            result = export(
                model,
                out,
                chosen,
                force=force,
                validate=not no_validate,
                progress=session.progress,
                **choices,
            )
        text = result_text(result.report, result.out, result.html_path, as_json=as_json, quiet=quiet)
        session.result(text, result.report["notices"])
    return GATE_FAILED if result.passed is False else 0
