"""What was measured of each model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from validators.speed.contents import Contents
from validators.speed.figures import Figure, figure, ratio
from validators.speed.workload import Workload


@dataclass(frozen=True)
class Rounds:
    """One model's rounds at one batch size.

    Attributes:
        batch: Sequences at once.
        prefill_s: Seconds of the prefill, by round: the time to the first token.
        step_s: Seconds of a decoding step, by round: the median of the round's steps, so that a step during which
            another process had the processor does not count for the whole round.
    """

    batch: int
    prefill_s: tuple[float, ...]
    step_s: tuple[float, ...]


@dataclass(frozen=True)
class ModelSpeed:
    """One model's figures.

    Attributes:
        name: Of the model in this measurement.
        contents: What is in its file.
        library: Version of the operator library that ran its packed weights; None without it.
        load_s: Seconds that ONNX Runtime took to load it, by load; its files were in the system's memory.
        anonymous_bytes: Memory of its own that loading it and decoding a few tokens have added to a process.
        mapped_bytes: Pages of its files that are in memory and shared with the system.
        working_bytes: As ``anonymous_bytes``, after all rounds: with the activations of prompts and batches.
        rounds: By batch size.
    """

    name: str
    contents: Contents
    library: str | None
    load_s: tuple[float, ...]
    anonymous_bytes: int | None
    mapped_bytes: int | None
    working_bytes: int | None
    rounds: tuple[Rounds, ...]

    def at(self, batch: int) -> Rounds:
        """The rounds of one batch size."""
        return next(rounds for rounds in self.rounds if rounds.batch == batch)

    def bytes_per_s(self, batch: int) -> float | None:
        """Bytes of weights read per second while decoding; None where the bytes of a step cannot be told."""
        size = self.contents.bytes_per_step
        return None if size is None else size / figure(self.at(batch).step_s).median


@dataclass(frozen=True)
class Speed:
    """A measurement of several models side by side.

    Attributes:
        models: In the order given, baselines last.
        baselines: Names of the models that the others are compared with.
        workload: What was measured.
        bandwidth: Bytes per second that this machine read, by round, in turn with the models.
        notices: What the reader of the figures should know.
    """

    models: tuple[ModelSpeed, ...]
    baselines: tuple[str, ...]
    workload: Workload
    bandwidth: tuple[float, ...]
    notices: tuple[str, ...] = ()

    def model(self, name: str) -> ModelSpeed:
        """The model of this name."""
        return next(model for model in self.models if model.name == name)

    def share_of_bandwidth(self, model: ModelSpeed, batch: int) -> float | None:
        """How much of the measured bandwidth reading the weights takes while decoding: 1 is the roof."""
        reached = model.bytes_per_s(batch)
        return None if reached is None else reached / figure(self.bandwidth).median

    def decode_ratio(self, model: ModelSpeed, baseline: str, batch: int) -> Figure:
        """Tokens per second of decoding over the baseline's, round by round."""
        return ratio(self.model(baseline).at(batch).step_s, model.at(batch).step_s)

    def prefill_ratio(self, model: ModelSpeed, baseline: str, batch: int) -> Figure:
        """Tokens per second of the prefill over the baseline's, round by round."""
        return ratio(self.model(baseline).at(batch).prefill_s, model.at(batch).prefill_s)

    def tree(self) -> dict[str, Any]:
        """All of it as values that JSON has. A model's own speeds are those of the first batch size."""
        return {
            "schema": 1,
            "workload": dataclasses.asdict(self.workload),
            "bandwidth_bytes_per_s": dataclasses.asdict(figure(self.bandwidth)),
            "models": [self._model_tree(model) for model in self.models],
            "notices": list(self.notices),
        }

    def _model_tree(self, model: ModelSpeed) -> dict[str, Any]:
        first = self._batch_tree(model, self.workload.batches[0])
        return {
            "name": model.name,
            "file": model.contents.path.name,
            "baseline": model.name in self.baselines,
            "library": model.library,
            "decode_tokens_per_s": first["decode_tokens_per_s"]["median"],
            "prefill_tokens_per_s": first["prefill_tokens_per_s"]["median"],
            "first_token_s": first["first_token_s"]["median"],
            "load_s": figure(model.load_s).median,
            "file_bytes": model.contents.file_bytes,
            "anonymous_bytes": model.anonymous_bytes,
            "mapped_bytes": model.mapped_bytes,
            "working_bytes": model.working_bytes,
            "weight_bytes_per_step": model.contents.bytes_per_step,
            "batches": [self._batch_tree(model, batch) for batch in self.workload.batches],
        }

    def _batch_tree(self, model: ModelSpeed, batch: int) -> dict[str, Any]:
        rounds = model.at(batch)
        others = [name for name in self.baselines if name != model.name]
        return {
            "batch": batch,
            "decode_tokens_per_s": dataclasses.asdict(decode_rate(rounds)),
            "prefill_tokens_per_s": dataclasses.asdict(prefill_rate(rounds, self.workload.prompt_tokens)),
            "first_token_s": dataclasses.asdict(figure(rounds.prefill_s)),
            "bandwidth_share": self.share_of_bandwidth(model, batch),
            "decode_ratio": {
                name: dataclasses.asdict(self.decode_ratio(model, name, batch)) for name in others
            },
            "prefill_ratio": {
                name: dataclasses.asdict(self.prefill_ratio(model, name, batch)) for name in others
            },
        }


def decode_rate(rounds: Rounds) -> Figure:
    """Tokens per second of decoding, over the whole batch."""
    return figure([rounds.batch / seconds for seconds in rounds.step_s])


def prefill_rate(rounds: Rounds, prompt_tokens: int) -> Figure:
    """Prompt tokens per second, over the whole batch."""
    return figure([rounds.batch * prompt_tokens / seconds for seconds in rounds.prefill_s])
