"""Two ways to show progress on stderr: one live line on a terminal, timed plain lines anywhere else."""

from __future__ import annotations

import time
from typing import IO, Protocol

from compressor.cli.terminal import printable
from compressor.cli.wording import (
    Remaining,
    block_line,
    blocks_done,
    cell_number,
    describe,
    labelled,
    losses_of,
    step_line,
)
from compressor.progress import (
    BlockFinished,
    BlockProgress,
    CellFinished,
    CellProgress,
    Event,
    FinetuningProgress,
    Notice,
    StageStarted,
    TaskProgress,
)
from compressor.report.units import duration


class Display(Protocol):
    """Shows events and lines until it is closed."""

    def show(self, event: Event) -> None:
        """Show one event."""

    def line(self, text: str) -> None:
        """Show a line that is not an event."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class NoDisplay:
    """Shows nothing (``-q``)."""

    def show(self, event: Event) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainDisplay:
    """Lines with time and level, no colours, no cursor moves."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._remaining = Remaining()

    def show(self, event: Event) -> None:
        """One line per event; none for a step inside a block."""
        left = ""
        if isinstance(event, (BlockProgress, BlockFinished)):
            left = self._remaining.after(event)
        shortfall = isinstance(event, Notice) and event.shortfall
        failed = isinstance(event, CellFinished) and event.error_id is not None
        level = "WARNING" if shortfall or failed else "INFO"
        for text in describe(event):
            self._write(level, f"{text} · {left}" if left else text)

    def line(self, text: str) -> None:
        """A line as a warning."""
        self._write("WARNING", text)

    def _write(self, level: str, text: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        print(f"{now} {level:<7} {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to put back."""


class LiveDisplay:
    """Settled facts as lines, and below them one live line: the block's bar, or the stage that runs."""

    def __init__(self, stream: IO[str], *, every_block: bool = False) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn

        from compressor.cli.bar import BlockBar

        self._console = Console(file=stream, highlight=False)  # rich itself honours NO_COLOR
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BlockBar(bar_width=20),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            transient=True,
            refresh_per_second=8,
        )
        self._task = self._progress.add_task("starting", total=None, detail="")
        self._every_block = every_block
        self._remaining = Remaining()
        self._finished: list[BlockFinished] = []
        self._progress.start()

    def show(self, event: Event) -> None:
        """Move the live line; print what is settled above it."""
        if isinstance(event, (BlockProgress, BlockFinished)):
            self._show_block(event)
        elif isinstance(event, CellProgress):
            left = f"{duration(event.left_s)} left" if event.left_s is not None else ""
            self._progress.update(
                self._task,
                description=cell_number(event),
                total=event.total,
                completed=event.number - 1,
                detail=" · ".join(
                    part for part in (printable(event.label), printable(event.detail), left) if part
                ),
            )
        elif isinstance(event, FinetuningProgress):
            self._progress.update(
                self._task,
                description=event.stage,
                total=event.steps,
                completed=event.step,
                detail=step_line(event),
            )
        elif isinstance(event, TaskProgress):
            self._progress.update(self._task, total=event.total, completed=event.done)
        elif isinstance(event, StageStarted):
            self._settle_blocks()
            self._progress.remove_task(self._task)  # a new one, as a bar cannot be taken from a task again
            self._task = self._progress.add_task(event.name, total=None, detail=printable(event.detail))
        else:
            for text in describe(event):
                self._print(text)

    def _show_block(self, event: BlockProgress | BlockFinished) -> None:
        if isinstance(event, BlockFinished):
            self._finished.append(event)
            if self._every_block:
                self._print(labelled("block", block_line(event)))
        finished = self._finished[-1] if self._finished else None
        left = self._remaining.after(event)
        facts = [losses_of(finished), f"{duration(finished.elapsed_s)} a block"] if finished else []
        current = min(event.index + (2 if isinstance(event, BlockFinished) else 1), event.total)
        self._progress.update(
            self._task,
            description=f"block {current:>{len(str(event.total))}}/{event.total}",
            total=event.total,
            completed=blocks_done(event),
            detail=" · ".join(part for part in (*facts, left) if part),
        )

    def _settle_blocks(self) -> None:
        if self._finished and not self._every_block:
            elapsed_s = sum(event.elapsed_s for event in self._finished)
            last = self._finished[-1]
            facts = [f"{len(self._finished)} of {last.total} in {duration(elapsed_s)}"]
            if last.steps:
                facts.append(f"the last: {losses_of(last)}")
            self._print(labelled("blocks", " · ".join(facts)))
        self._finished.clear()

    def line(self, text: str) -> None:
        """A line above the live one."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the live line away."""
        self._progress.stop()
