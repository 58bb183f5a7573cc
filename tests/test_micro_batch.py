"""A batch in parts gives what the whole batch gives, and a device out of memory halves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from finetune_samples import source_of, sparse_model
from finetune_samples import weights_of as model_weights
from repair_samples import sample, weights_of
from safetensors.torch import load_file

from compressor.block_pass import BlockPass
from compressor.devices import limited_device_memory
from compressor.errors import OutOfResources
from compressor.finetuning import kl, squarehead
from compressor.linears import IgnoreRules
from compressor.micro_batch import MicroBatch
from compressor.models.source import LoadedSource
from compressor.models.writer import CheckpointWriter
from compressor.pass_state import PassState
from compressor.progress import BlockFinished, Event, Notice, silent
from compressor.recipe import FinishRecipe, RecoveryRecipe
from compressor.recipe_file import read_overrides
from compressor.recovery import ebft, ebft_mask
from compressor.recovery.training import parts_of
from compressor.run import faults
from compressor.run.state import StateFolder
from compressor.sparsity import SparsityPattern

IDS = torch.randint(4, 90, (16, 12), generator=torch.Generator().manual_seed(0))
FINISH = {"finish__method": "kl", "finish__lr": 1e-3, "finish__epochs": 1}
# Sums run in another order: AdamW divides by the root of squares of gradients, so that roundings of 1e-7 in those
# are up to 1e-4 of an update of size lr = 1e-2, a few steps long.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def no_points_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of faults begin at 0 in each test."""
    monkeypatch.setattr(faults, "_reached", {})


def test_parts_of_a_batch_hold_every_row_once_in_order() -> None:
    """Parts of at most the size, the last one shorter; a batch that fits stays one."""
    assert parts_of([5, 3, 8, 1, 0], 2) == [[5, 3], [8, 1], [0]]
    assert parts_of([5, 3], 2) == parts_of([5, 3], None) == [[5, 3]]


@pytest.mark.parametrize("first_token", ["keep", "per_token"])
@pytest.mark.parametrize("method", [ebft, ebft_mask])
def test_repair_in_parts_equals_the_repair_of_whole_batches(method: Any, first_token: str) -> None:
    """Weights and losses agree; 11 windows in batches of 4 leave parts of 3, 1 and 3."""
    recipe = RecoveryRecipe(epochs=3, batch_size=4, lr=1e-2, first_token=first_token)  # type: ignore[arg-type]
    found = []
    for size in (None, 3):
        given = sample(windows=11)
        repaired = method.repair(
            given.block, given.masks, replace(given.io, micro_batch=size), recipe, lr=1e-2, seed=5
        )
        found.append((weights_of(given.block), repaired))
    (whole, told), (parts, told_of_parts) = found
    torch.testing.assert_close(parts, whole, **TOLERANCE)
    assert told_of_parts.loss_after == pytest.approx(told.loss_after, rel=1e-4)
    assert told_of_parts.train_loss_last == pytest.approx(told.train_loss_last, rel=1e-4)
    assert (told_of_parts.steps, told_of_parts.best_step) == (told.steps, told.best_step)


@pytest.mark.parametrize(("noise", "source"), [(0.0, "text"), (0.3, "text"), (0.3, "model")])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_finish_in_parts_equals_the_finish_of_whole_batches(
    noise: float, source: Literal["text", "model"], weight: float
) -> None:
    """KL, the layers' errors over the whole batch's mean square, and the same tokens exchanged."""
    recipe = FinishRecipe(epochs=2, batch_size=4, lr=3e-3, squarehead=weight, noise=noise, noise_from=source)
    whole, parts = sparse_model(), replace(sparse_model(), micro_batch=1)
    told, told_of_parts = (
        kl.finish(model, recipe, seed=3, tell=lambda step: None) for model in (whole, parts)
    )
    torch.testing.assert_close(model_weights(parts), model_weights(whole), **TOLERANCE)
    assert told_of_parts.loss_before == pytest.approx(told.loss_before, rel=1e-5)
    assert told_of_parts.loss_after == pytest.approx(told.loss_after, rel=1e-4)


def test_squarehead_in_parts_equals_that_of_whole_batches() -> None:
    """Cross entropy with the text adds up over parts, too."""
    recipe = RecoveryRecipe.model_validate({"method": "squarehead", "epochs": 2, "batch_size": 4, "lr": 3e-3})
    whole, parts = sparse_model(), replace(sparse_model(), micro_batch=2)
    for model in (whole, parts):
        squarehead.repair(model, recipe, seed=3, tell=lambda step: None)
    torch.testing.assert_close(model_weights(parts), model_weights(whole), **TOLERANCE)


def test_attempts_halve_until_it_fits_and_the_size_stays() -> None:
    """8, 4 and 2 windows are too many; each attempt begins from what came, and the next work begins at 1."""
    told: list[Event] = []
    micro_batch, tried, again = MicroBatch(told.append), list[int | None](), list[int]()

    def work(size: int | None) -> str:
        tried.append(size)
        if size is None or size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return "done"

    settings = {"again": lambda: again.append(1), "batch_size": 8, "what": "the repair", "remedy": "less"}
    assert micro_batch.attempt(work, **settings) == "done"  # type: ignore[arg-type]
    assert tried == [None, 4, 2, 1]
    assert len(again) == 3
    assert micro_batch.attempt(work, **settings) == "done"  # type: ignore[arg-type]
    assert tried[4:] == [1]
    assert [event.message for event in told if isinstance(event, Notice)] == micro_batch.notices
    assert "4 windows at once instead of 8" in micro_batch.notices[0]


def test_a_window_that_does_not_fit_is_an_error() -> None:
    """At one window there is nothing left to halve: the id, what was worked on, what to do."""

    def work(size: int | None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfResources, match="the repair of block 3 does not fit") as caught:
        MicroBatch(silent).attempt(
            work, again=lambda: None, batch_size=4, what="the repair of block 3", remedy="give less"
        )
    assert (caught.value.error_id, caught.value.exit_code) == ("E-DEVICE-MEMORY", 5)
    assert caught.value.remedy == "give less"


def press(
    source: LoadedSource, out: Path, told: list[Event], state: StateFolder | None = None, **settings: Any
) -> Any:
    """A pass of two windows of blocks, in batches of 4 windows of tokens, into ``out`` as float32."""
    short = {"pruning.method": "wanda", "recovery.epochs": 2, "recovery.batch_size": 4, "recovery.lr": 1e-2}
    block_pass = BlockPass(
        source, IDS[:8], IDS[8:12], IDS[12:],
        recipe=read_overrides(short | {key.replace("__", "."): value for key, value in settings.items()}),
        pattern=SparsityPattern.unstructured(0.5), ignore=IgnoreRules(()), device=torch.device("cpu"),
        stop=lambda: False, progress=told.append,
        state=None if state is None else PassState(state, {}, source, next(state.commits(), None)),
    )  # fmt: skip
    writer = CheckpointWriter(out, source, torch.float32)
    passed = block_pass.run(writer)
    writer.finish()
    return passed


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a model folder."""
    shards = [path for path in folder.glob("*.safetensors") if "masks" not in path.name]
    return {name: weight for path in shards for name, weight in load_file(path).items()}


@pytest.mark.parametrize(
    ("point", "settings", "halved"),
    [
        ("repair: after a step#2", {"recovery__window": "overlap"}, "2 windows at once instead of 4"),
        (
            "repair: before#2",
            {"recovery__lr": "auto", "recovery__probe__epochs": 1},
            "2 windows at once instead of 4",
        ),
        ("tuning: after a step#3", FINISH, "1 windows at once instead of 2"),
    ],
)
def test_pass_out_of_memory_goes_on_with_half_and_ends_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, settings: dict[str, Any], halved: str
) -> None:
    """A pass whose device ran out in the middle ends with the weights of one that did not, and says so."""
    source, told = source_of("llama"), list[Event]()
    press(source, tmp_path / "plain", [], **settings)
    monkeypatch.setenv(faults.VARIABLE, f"{point}:oom")
    passed = press(source, tmp_path / "halved", told, StateFolder(tmp_path / "state"), **settings)
    (notice,) = passed.notices
    assert halved in notice
    assert Notice(notice) in told
    plain, found = stored(tmp_path / "plain"), stored(tmp_path / "halved")
    assert plain.keys() == found.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=5e-5)
        assert torch.equal(found[name] == 0, weight == 0), name


def test_pass_without_room_for_a_window_ends_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory every time: 4, 2 and 1 windows are tried, and the error names the block."""
    monkeypatch.setenv(faults.VARIABLE, "repair: after a step#1+:oom")
    told: list[Event] = []
    with pytest.raises(
        OutOfResources, match=r"the repair of model\.layers\.0 .*one window at a time"
    ) as caught:
        press(source_of("llama"), tmp_path / "out", told)
    assert caught.value.error_id == "E-DEVICE-MEMORY"
    assert "--seqlen" in caught.value.remedy
    assert sum(isinstance(event, Notice) and "memory ran out" in event.message for event in told) == 2


def test_pass_that_goes_on_keeps_the_halved_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind the block in which it halved, the next one gives the bytes of the pass that was not."""
    source, state = source_of("llama"), StateFolder(tmp_path / "state")
    monkeypatch.setenv(faults.VARIABLE, "repair: after a step:oom")
    press(source, tmp_path / "whole", [], state)
    (tmp_path / "state" / "00002.json").unlink()
    monkeypatch.delenv(faults.VARIABLE)
    told: list[Event] = []
    press(source, tmp_path / "parts", told, state)
    assert sum(isinstance(event, BlockFinished) for event in told) == 1
    parts, whole = stored(tmp_path / "parts"), stored(tmp_path / "whole")
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


def test_limit_of_a_device_without_memory_of_its_own_is_told() -> None:
    """On the CPU --max-device-memory changes nothing, and a line says so; without it there is no line."""
    with limited_device_memory(torch.device("cpu"), 2**30) as line:
        assert line == "--max-device-memory is of no effect on cpu"
    with limited_device_memory(torch.device("cpu"), None) as line:
        assert line is None
