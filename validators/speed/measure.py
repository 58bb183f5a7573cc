"""Several models measured side by side: each in a process of its own, one at a time, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from validators.errors import ValidationUsageError
from validators.speed.bandwidth import largest_cache_bytes
from validators.speed.contents import Contents
from validators.speed.figures import turn_order
from validators.speed.process import WorkerProcess
from validators.speed.results import ModelSpeed, Rounds, Speed
from validators.speed.workload import Workload

BANDWIDTH = "memory bandwidth"
_WARM_UP_STEPS = 4
Progress = Callable[[str, int, int], None]


@dataclass
class _Running:
    """A model whose process is there, and what has been measured of it so far."""

    name: str
    contents: Contents
    worker: WorkerProcess
    load_s: list[float] = field(default_factory=list)
    library: str | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    prefill_s: dict[int, list[float]] = field(default_factory=dict)
    step_s: dict[int, list[float]] = field(default_factory=dict)

    def turn(self, workload: Workload, batch: int, seed: int) -> None:
        """Prefill and decode once, and note the seconds."""
        seconds = self.worker.ask(
            "turn",
            batch=batch,
            prompt_tokens=workload.prompt_tokens,
            decode_tokens=workload.decode_tokens,
            seed=seed,
        )
        self.prefill_s.setdefault(batch, []).append(seconds["prefill_s"])
        self.step_s.setdefault(batch, []).append(statistics.median(seconds["step_s"]))

    def warm_up(self, workload: Workload) -> None:
        """Turns that do not count: a few single tokens, the memory after them, then one of each batch size."""
        turn = {"decode_tokens": _WARM_UP_STEPS, "seed": workload.seed}
        # A prompt of one token: what the model takes by itself, without the activations of long prompts.
        self.worker.ask("turn", batch=1, prompt_tokens=1, **turn)
        files = [str(path.resolve()) for path in (self.contents.path, *self.contents.data_files)]
        self.memory = self.worker.ask("memory", files=files)
        for batch in workload.batches:
            self.worker.ask("turn", batch=batch, prompt_tokens=workload.prompt_tokens, **turn)

    def finish(self) -> None:
        """Note the memory after all rounds."""
        self.memory["working_bytes"] = self.worker.ask("memory", files=[])["anonymous_bytes"]

    def result(self) -> ModelSpeed:
        """Everything that was measured of the model."""
        rounds = tuple(
            Rounds(batch, tuple(self.prefill_s[batch]), tuple(self.step_s[batch])) for batch in self.step_s
        )
        return ModelSpeed(
            self.name, self.contents, self.library, tuple(self.load_s), **self.memory, rounds=rounds
        )


def measure(
    models: Mapping[str, Contents],
    baselines: Sequence[str],
    workload: Workload,
    *,
    require_library: bool = False,
    reader_bytes: int | None = None,
    progress: Progress | None = None,
) -> Speed:
    """The speed and memory of every model.

    Each model is loaded ``workload.loads`` times, in a fresh process each time, the models in turns; the last process
    of each stays. Then all take turns, prefill and decoding, and between them memory is read at full speed: whatever
    slows the machine for a while slows all of them.

    Args:
        models: By name, each name once.
        baselines: Those that the others are compared with.
        workload: What to measure.
        require_library: Refuse to run packed weights without the operator library.
        reader_bytes: Of the buffer that bandwidth is measured by; None: far more than the caches hold.
        progress: Called with what is done now, and steps done and in all.

    Raises:
        ReportedError: What ``WorkerProcess.ask`` raises.
    """
    steps = _Steps(
        progress or _ignore, len(models) * (workload.loads + 1) + workload.rounds * len(workload.batches)
    )
    with ExitStack() as processes:
        running = _load(models, workload, require_library, processes, steps)
        for one in running:
            one.warm_up(workload)
            steps.done(f"warming up {one.name}")
        reader = processes.enter_context(WorkerProcess(BANDWIDTH))
        reader.ask("open_reader", threads=workload.threads, size_bytes=reader_bytes)
        bandwidth = []
        for turn in range(workload.rounds):
            for batch in workload.batches:
                for place in turn_order(len(running), turn):
                    running[place].turn(workload, batch, workload.seed + 1 + turn)
                bandwidth.append(reader.ask("read")["bytes_per_s"])
                steps.done(f"round {turn + 1} of {workload.rounds}")
        for one in running:
            one.finish()
        results = tuple(one.result() for one in running)
    return Speed(results, tuple(baselines), workload, tuple(bandwidth), _notices(results))


def _load(
    models: Mapping[str, Contents],
    workload: Workload,
    require_library: bool,
    processes: ExitStack,
    steps: _Steps,
) -> list[_Running]:
    """Load every model as often as asked; the processes of the last load stay until ``processes`` end."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    running = []
    for load in range(workload.loads):
        last = load + 1 == workload.loads
        for name, contents in models.items():
            with ExitStack() as own:
                worker = own.enter_context(WorkerProcess(name))
                told = worker.ask(
                    "load",
                    path=str(contents.path.absolute()),
                    threads=workload.threads,
                    packed=contents.has_own_operators,
                    require_library=require_library,
                )
                seconds[name].append(told["load_s"])
                if last:
                    processes.push(own.pop_all())
                    running.append(_Running(name, contents, worker, seconds[name], told["library"]))
            steps.done(f"loading {name}")
    return running


class _Steps:
    """Counts what is done for the progress callback."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._count = progress, total, 0

    def done(self, what: str) -> None:
        """One step more."""
        self._count += 1
        self._progress(what, self._count, self._total)


def _ignore(what: str, done: int, total: int) -> None:
    """Take no notice."""


def _notices(models: Sequence[ModelSpeed]) -> tuple[str, ...]:
    """What makes figures mean less than they seem to."""
    cache, notices = largest_cache_bytes(), []
    small = [model.name for model in models if 0 < (model.contents.bytes_per_step or 0) < 2 * cache]
    if small:
        notices.append(
            f"{', '.join(small)}: the weights of a step fit into the processor's cache ({cache / 2**20:.0f} MiB) or "
            "nearly so: these speeds say little about larger models"
        )
    for model in models:
        if model.contents.has_own_operators and model.library is None:
            unpacked = " unpacked the weights at every step" if model.contents.packed_products else " ran"
            notices.append(
                f"{model.name}: without the operator library blockpress-runtime functions in the file{unpacked}"
            )
        if model.contents.cache_room and model.library is not None:
            notices.append(
                f"{model.name}: new tokens went into room behind the cache, as in blockpress-generate; without "
                "such room, every step copies the cache"
            )
        if model.contents.form == "sparse-initializers":
            notices.append(
                f"{model.name}: ONNX Runtime expands sparse initializers as it loads them; it runs as dense"
            )
    return tuple(notices)


def check_workload(workload: Workload) -> None:
    """Refuse a measurement that would measure nothing.

    Raises:
        ValidationUsageError: E-BENCH-WORKLOAD.
    """
    sizes = {
        "--prompt-tokens": workload.prompt_tokens,
        "--decode-tokens": workload.decode_tokens,
        "--threads": workload.threads,
        "--rounds": workload.rounds,
        "--loads": workload.loads,
        "--batch": min(workload.batches, default=0),
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValidationUsageError(
                "E-BENCH-WORKLOAD", f"{name} must be at least 1, got {size}", "give 1 or more"
            )
