"""How a comparison measured, in sentences that stand beside its tables."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.comparison.results import CellRow, Comparison, TaskFacts
from compressor.report.units import number, perplexity


def protocol_lines(comparison: Comparison) -> list[str]:
    """How perplexity was measured, on which text, how tasks were run; what cells had in common."""
    lines = []
    for name, text in comparison.texts.items():
        facts = (
            f"{text.windows} windows of {text.window} tokens",
            f"stride {text.stride}",
            f"{text.tokens} predicted tokens",
            f"BOS {text.bos}" if text.bos is not None else "",
            f"joined by {text.join}" if text.join not in (None, "single text") else "one text",
            text.dtype or "",
        )
        lines.append(
            f"perplexity on {name}: exp of the mean nats per token, {', '.join(f for f in facts if f)}"
        )
    if comparison.tasks is not None:
        lines.append(tasks_sentence(comparison.tasks))
    lines.append(masks_sentence(comparison.cells))
    return lines


def tasks_sentence(tasks: TaskFacts) -> str:
    """How tasks were run, and on what."""
    some = "all documents" if tasks.limit is None else f"the first {number(tasks.limit)} documents of each"
    folder = f" of the folder {tasks.folder}" if tasks.folder is not None else ""
    return (
        f"tasks {', '.join(tasks.names)}{folder} by lm-eval {tasks.lm_eval}: zero-shot, no chat template, {some}, "
        f"at most {number(tasks.max_tokens)} tokens at once, on the PyTorch models in float32; "
        "± is the standard error"
    )


def masks_sentence(cells: Sequence[CellRow]) -> str:
    """What the recoveries of one pruner have in common."""
    if any(cell.masks == "shared" for cell in cells):
        return (
            "masks are shared: all recoveries of one pruner and sparsity start from the same pruned model, that of the "
            "pass without recovery, so they differ in the recovery alone; --masks own gives what compress run gives"
        )
    return (
        "masks are each cell's own, as in compress run: a block is pruned by what the repaired blocks before it give, "
        "so the same pruner chooses other weights after another recovery"
    )


def dense_sentence(comparison: Comparison) -> str:
    """The dense model's perplexity on each text."""
    done = next((cell.figures for cell in comparison.cells if cell.figures is not None), None)
    if done is None:
        return "perplexity not measured"
    found = (f"{perplexity(done.perplexity[name].dense)} on {name}" for name in comparison.texts)
    return f"perplexity {', '.join(found)}"
