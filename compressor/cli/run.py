"""``compress run``: prune, repair, export, validate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from compressor.cli import options
from compressor.cli.sections import SectionedCommand

if TYPE_CHECKING:  # they load torch, which waits for the lock
    from compressor.delivery import CompressionResult
    from compressor.progress import Progress
    from compressor.recipe import Recipe

GATE_FAILED = 4


@click.command("run", cls=SectionedCommand, short_help="Prune, repair, export and validate a model.")
@click.argument("model")
@options.output_options
@options.resume_option
@options.dry_run_option
@options.recipe_options
@options.settings(
    options.PRUNING,
    options.RECOVERY,
    options.CALIBRATION,
    options.EVALUATION,
    options.EXPORT,
    options.GATES,
)
@options.device_option
@options.activation_memory_option
@options.max_device_memory_option
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
    resume: str,
    dry_run: bool,
    **choices: Any,
) -> int:
    """Prune MODEL, repair it block by block, export it and prove the file right.

    MODEL is a Hugging Face folder or a hub id. Options beat the recipe, the recipe beats the defaults.
    """
    from compressor.cli.ranked_run import run_ranked
    from compressor.cli.session import open_session, refuse_launch
    from compressor.cli.signals import stop_between_blocks
    from compressor.cli.summary import result_text
    from compressor.run.launch import launched
    from compressor.run.output import reserve_output

    with open_session("run", quiet=quiet, verbosity=verbosity) as session:
        settings = options.recipe_overrides(assignments, overrides, seed)
        from compressor.recipe_file import read_recipe

        chosen = read_recipe(recipe, settings)
        launch = launched()
        if dry_run:
            if launch is not None:
                refuse_launch("run --dry-run", launch)
            session.result(_estimate(model, out, chosen, force, as_json, session.progress, choices))
            return 0
        may_be_done = resume != "never" and not force
        reserved: AbstractContextManager[object] = (
            reserve_output(out, force, model=model, may_be_done=may_be_done)
            if launch is None
            else nullcontext()  # rank 0 does it when all have come together, who then hear of a refusal
        )
        with stop_between_blocks(session.display.line) as stop, reserved:
            choices |= {"resume": resume, "stop": stop, "progress": session.progress}
            choices |= {"force": force, "validate": not no_validate}
            result: CompressionResult | None
            if launch is None:
                from compressor.pipeline import compress  # loads torch, so after the lock

                result = compress(model, out, chosen, **choices)
            else:
                result = run_ranked(launch, model, out, chosen, **choices)
        if result is None:
            return 0
        text = result_text(result.report, result.out, result.html_path, as_json=as_json, quiet=quiet)
        session.result(text, result.report["notices"])
    return GATE_FAILED if result.passed is False else 0


# Choices of the validation, which an estimate has nothing to do with.
_OF_VALIDATION = ("provider", "parity", "require")


def _estimate(
    model: str,
    out: str,
    recipe: Recipe,
    force: bool,
    as_json: bool,
    progress: Progress,
    choices: Mapping[str, Any],
) -> str:
    """What a dry run prints on stdout; raises where the run does not fit."""
    from compressor.cli.estimate_text import estimate_text
    from compressor.dry_run import estimate_run
    from compressor.estimating import refuse_misfits

    given = {key: value for key, value in choices.items() if key not in _OF_VALIDATION}
    estimate = estimate_run(model, out, recipe, force=force, progress=progress, **given)
    refuse_misfits(estimate)
    return json.dumps({"estimate": estimate.tree()}, indent=1) if as_json else estimate_text(estimate)
