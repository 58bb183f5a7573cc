"""What a progress event says, in one line for a terminal and for a log alike."""

from __future__ import annotations

from compressor.cli.terminal import printable
from compressor.progress import (
    BlockFinished,
    BlockProgress,
    CellFinished,
    CellProgress,
    EstimateReady,
    Event,
    FinetuningFinished,
    FinetuningProgress,
    LearningRateChosen,
    Notice,
    RunStarted,
    StageStarted,
    TextReady,
)
from compressor.report.units import count, duration, number, perplexity

LABEL_WIDTH = 15


def labelled(label: str, text: str) -> str:
    """``text`` behind a label in a column of its own."""
    return f"{printable(label):<{LABEL_WIDTH}}{printable(text)}".rstrip()


def describe(event: Event) -> list[str]:
    """The lines that tell of an event; none for one that only moves a bar."""
    if isinstance(event, RunStarted):
        return _run_started(event)
    if isinstance(event, TextReady):
        kept = f", {event.heldout_windows} more held out" if event.heldout_windows else ""
        return [
            labelled(
                event.role, f"{event.source}, {event.windows} windows × {event.window_tokens} tokens{kept}"
            )
        ]
    if isinstance(event, EstimateReady):
        return [labelled("estimate", event.resources), labelled("", event.time)]
    if isinstance(event, LearningRateChosen):
        tried = ", ".join(number(lr, 3) for lr in event.tried)
        return [labelled("learning rate", f"{number(event.lr, 3)}, best of {tried} on held-out windows")]
    if isinstance(event, BlockFinished):
        return [labelled("block", block_line(event))]
    if isinstance(event, FinetuningFinished):
        return [labelled(event.stage, finetuning_line(event))]
    if isinstance(event, CellProgress) and not event.detail:
        return [labelled(cell_number(event), event.label)]
    if isinstance(event, CellFinished):
        return [labelled(cell_number(event), cell_line(event))]
    if isinstance(event, StageStarted):
        return [labelled(event.name, event.detail)]
    if isinstance(event, Notice):
        return [labelled("warning" if event.shortfall else "note", event.message)]
    return []


def _run_started(event: RunStarted) -> list[str]:
    types = event.checkpoint_dtype
    if event.export_dtype != types:
        types = f"{types} → {event.export_dtype}"
    facts = (
        event.architecture,
        f"{event.num_blocks} blocks",
        f"{count(event.prunable_weights)} weights to prune",
        types,
        event.device,
    )
    return [
        labelled(event.model, f"  {' · '.join(facts)}"),
        labelled(
            "plan",
            f"prune {_share(event.pattern)} by {event.pruner} · recovery {event.recovery}"
            + (f" · finish {event.finish}" if event.finish != "none" else ""),
        ),
    ]


def _share(pattern: str) -> str:
    """``50 %`` for ``0.5``; ``2:4`` as it is."""
    try:
        return f"{100 * float(pattern):g} %"
    except ValueError:
        return pattern


def block_line(event: BlockFinished) -> str:
    """``7/16  loss 0.0412 → 0.0087 (best at step 290 of 320)  11.0 s``."""
    parts = (f"{event.index + 1}/{event.total}", losses_of(event), duration(event.elapsed_s))
    return "  ".join(part for part in parts if part)


def losses_of(event: BlockFinished) -> str:
    """``loss 0.0412 → 0.0087 (best at step 290 of 320)``; "" when nothing was repaired."""
    if not event.steps or event.loss_before is None:
        return ""
    best = f"(best at step {event.best_step} of {event.steps})"
    return f"loss {number(event.loss_before)} → {number(event.loss_after)} {best}"


def finetuning_line(event: FinetuningFinished) -> str:
    """``kl 1.303 → 0.989 (best at step 56 of 70), 554 K weights, learning rate 0.003, best of …  12.3 s``."""
    best = f"(best at step {event.best_step} of {event.steps})"
    tried = f", best of {', '.join(number(lr, 3) for lr in event.tried)}" if event.tried else ""
    return (
        f"{event.loss} {number(event.loss_before)} → {number(event.loss_after)} {best}, "
        f"{count(event.trained_parameters)} weights, learning rate {number(event.lr, 3)}{tried}  "
        f"{duration(event.elapsed_s)}"
    )


def step_line(event: FinetuningProgress) -> str:
    """``step 12 of 70``, or which learning rate is being tried."""
    step = f"step {event.step} of {event.steps}"
    return f"trying learning rate {number(event.lr, 3)}, {step}" if event.trial else step


def cell_number(event: CellProgress | CellFinished) -> str:
    """``cell 3/45``."""
    return f"cell {event.number:>{len(str(event.total))}}/{event.total}"


def cell_line(event: CellFinished) -> str:
    """``wanda · 50 % · ebft  perplexity 17.80 → 8.420  12.3 s · 4 min 2 s left``, or why the cell failed."""
    if event.error_id is not None:
        facts = f"failed: {event.error_id}, {event.error}"
    elif event.pruned == event.recovered:
        facts = f"perplexity {perplexity(event.pruned)}"
    else:
        facts = f"perplexity {perplexity(event.pruned)} → {perplexity(event.recovered)}"
    left = f" · {duration(event.left_s)} left" if event.left_s else ""
    return f"{event.label}  {facts}  {duration(event.elapsed_s)}{left}"


class Remaining:
    """Time left at the pace of the last block; the first ones also look for a learning rate."""

    def __init__(self) -> None:
        self._elapsed_s: float | None = None

    def after(self, event: BlockProgress | BlockFinished) -> str:
        """``1 min 50 s left``, the present block's share counted; "" before the first block ends and at the end."""
        if isinstance(event, BlockFinished):
            self._elapsed_s = event.elapsed_s
        open_blocks = event.total - blocks_done(event)
        if self._elapsed_s is None or open_blocks <= 0:
            return ""
        return f"{duration(open_blocks * self._elapsed_s)} left"


def blocks_done(event: BlockProgress | BlockFinished) -> float:
    """How many blocks are finished, the share of the present one included."""
    if isinstance(event, BlockFinished):
        return event.index + 1.0
    return event.index + (event.step / event.steps if event.steps else 0.0)
