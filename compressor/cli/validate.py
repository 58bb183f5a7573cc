"""``compress validate``: judge an export, ours or another tool's, without compressing again."""

from __future__ import annotations

from typing import Any

import click

from compressor.cli import options
from compressor.cli.run import GATE_FAILED
from compressor.cli.sections import SectionedCommand
from compressor.cli.tasks import task_options


@click.command(
    "validate", cls=SectionedCommand, short_help="Prove an ONNX file right, or find where it errs."
)
@click.argument("path", metavar="ONNX")
@options.flag(
    "Comparison",
    "--reference",
    metavar="FOLDER",
    help="The PyTorch model to compare with; by default the .hf folder beside the file.",
)
@options.flag("Comparison", "--dense", metavar="MODEL", help="The model before pruning: measure it too.")
@options.flag(
    "Comparison", "--structure-only", is_flag=True, help="Judge the file by itself; compare with nothing."
)
@options.flag(
    "Comparison", "--trust-remote-code", is_flag=True, help="Run code that comes with the reference."
)
@options.settings(options.EVALUATION, options.EVALUATION_DATASET, options.GATES)
@options.validation_options
@options.flag(
    "Validation",
    "--lm-eval",
    is_flag=True,
    help="Measure perplexity once more with lm-eval-harness's own onnxruntime backend.",
)
@task_options
@options.flag("Other", "--report", "report_path", metavar="PATH", help="Write PATH.json and PATH.html.")
@options.talk_options
def command(
    path: str,
    overrides: dict[str, Any],
    report_path: str | None,
    as_json: bool,
    verbosity: int,
    quiet: bool,
    **choices: Any,
) -> int:
    """Check ONNX, a file or a folder with model.onnx: whole, well formed, and the same numbers as PyTorch.

    A check that could not be made is skipped with its reason, never passed.
    """
    from compressor.cli.session import open_session
    from compressor.cli.signals import stop_at_once
    from compressor.cli.summary import summarise_validation
    from compressor.cli.terminal import json_text

    with open_session("validate", quiet=quiet, verbosity=verbosity) as session, stop_at_once():
        from compressor.recipe_file import read_overrides

        recipe = read_overrides(overrides)
        from compressor.validation import validate_export
        from compressor.validation_report import publish_report, report_paths, validation_document

        places = None if report_path is None else report_paths(report_path)
        outcome = validate_export(
            path,
            evaluation=recipe.evaluation,
            gates=recipe.gates,
            progress=session.progress,
            **choices,
        )
        report = validation_document(outcome)
        if places is not None:
            publish_report(report, *places)
        tree = report.tree()
        if as_json:
            text = json_text(tree)
        else:
            text = summarise_validation(tree, outcome.plan.onnx, places and places[1], quiet=quiet)
        session.result(text, report.notices)
    return 0 if outcome.report.passed else GATE_FAILED
