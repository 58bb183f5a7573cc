"""``compress run``: prune, repair, export, validate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from compressor.cli import options
from compressor.cli.sections import SectionedCommand

if TYPE_CHECKING:
    from compressor.delivery import CompressionResult

GATE_FAILED = 4


@click.command("run", cls=SectionedCommand, short_help="Prune, repair, export and validate a model.")
@click.argument("model")
@options.output_options
@options.resume_option
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
    **choices: Any,
) -> int:
    """Prune MODEL, repair it block by block, export it and prove the file right.

    MODEL is a Hugging Face folder or a hub id. Options beat the recipe, the recipe beats the defaults.
    """
    from compressor.cli.ranked_run import run_ranked
    from compressor.cli.session import open_session
    from compressor.cli.signals import stop_between_blocks
    from compressor.cli.summary import result_text
    from compressor.run.launch import launched
    from compressor.run.output import reserve_output

    with open_session("run", quiet=quiet, verbosity=verbosity) as session:
        settings = options.recipe_overrides(assignments, overrides, seed)
        from compressor.recipe_file import read_recipe

        chosen = read_recipe(recipe, settings)
        may_be_done = resume != "never" and not force
        launch = launched()
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
