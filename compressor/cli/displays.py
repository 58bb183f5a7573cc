"""Two ways to show progress on stderr: one live line on a terminal, timed plain lines anywhere else."""

from __future__ import annotations

import time
from typing import IO, Protocol

from compressor.cli.wording import Remaining, block_line, blocks_done, describe, labelled
from compressor.progress import BlockFinished, BlockProgress, Event, Notice, StageStarted


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
            left = self._remaining.after(blocks_done(event), event.total)
        level = "WARNING" if isinstance(event, Notice) else "INFO"
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
        self._last: BlockFinished | None = None
        self._progress.start()

    def show(self, event: Event) -> None:
        """Move the live line; print what is settled above it."""
        if isinstance(event, (BlockProgress, BlockFinished)):
            self._show_block(event)
            return
        if isinstance(event, StageStarted):
            self._settle_blocks()
            self._progress.reset(self._task, description=f"{event.name}", total=None, detail=event.detail)
            return
        for text in describe(event):
            self._print(text)

    def _show_block(self, event: BlockProgress | BlockFinished) -> None:
        if isinstance(event, BlockFinished):
            self._last = event
            if self._every_block:
                self._print(labelled("block", block_line(event)))
        done = blocks_done(event)
        left = self._remaining.after(done, event.total)
        loss = block_line(self._last).split("  ", 1)[1] if self._last is not None else ""
        current = min(event.index + (2 if isinstance(event, BlockFinished) else 1), event.total)
        self._progress.update(
            self._task,
            description=f"block {current:>{len(str(event.total))}}/{event.total}",
            total=event.total,
            completed=done,
            detail=" · ".join(part for part in (loss, left) if part),
        )

    def _settle_blocks(self) -> None:
        if self._last is not None and not self._every_block:
            self._print(
                labelled(
                    "blocks",
                    f"{self._last.index + 1}/{self._last.total} done; the last: {block_line(self._last)}",
                )
            )
        self._last = None

    def line(self, text: str) -> None:
        """A line above the live one."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the live line away."""
        self._progress.stop()
