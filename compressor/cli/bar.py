"""The bar of the live line. A module of its own, so that rich is loaded for a terminal only."""

from __future__ import annotations

from rich.progress import BarColumn, Task
from rich.progress_bar import ProgressBar


class BlockBar(BarColumn):
    """A bar while blocks are counted, and nothing during a stage that counts none."""

    def render(self, task: Task) -> ProgressBar:
        """The bar, of no width where there is no total."""
        bar = super().render(task)
        if task.total is None:
            bar.width = 0
        return bar
