"""A pass that goes on behind any of its windows commits the bytes of one that was never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_models
import torch
from torch import nn

from compressor.block_pass import BlockPass
from compressor.block_result import PassResult
from compressor.end_to_end import EndToEnd
from compressor.errors import StoppedSafely
from compressor.linears import IgnoreRules
from compressor.models.checkpoint import open_checkpoint
from compressor.models.source import LoadedSource, open_source
from compressor.models.writer import CheckpointWriter
from compressor.pass_state import PassState
from compressor.recipe import Recipe
from compressor.recipe_file import read_overrides
from compressor.run.state import StateFolder
from compressor.sparsity import Mask, SparsityPattern
from compressor.streams import limited_activations

CPU = torch.device("cpu")
IDS = torch.randint(4, 90, (16, 12), generator=torch.Generator().manual_seed(0))
SHORT = {"recovery.epochs": 2, "recovery.batch_size": 4, "recovery.lr": 1e-2}
VARIANTS: dict[str, dict[str, Any]] = {
    "overlapping windows, rate by trial": {
        "recovery.window": "overlap",
        "recovery.lr": "auto",
        "recovery.probe.epochs": 1,
    },
    "attention, then MLP": {"recovery.window": "split"},
    "warm start": {"recovery.window": "block", "recovery.start": "least_squares"},
    "moved masks": {"recovery.method": "dsnot"},
    "no repair": {"recovery.method": "none"},
    "units taken out": {"pruning.method": "flap", "recovery.window": "overlap"},
    "shared out over blocks": {"pruning.allocation": "owl", "recovery.window": "block"},
    "finish": {"finish.method": "kl", "finish.epochs": 1, "finish.lr": 1e-3, "recovery.window": "overlap"},
    "tuned end to end": {"recovery.method": "masked-lora", "recovery.masked_lora.lr": 1e-3},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LoadedSource:
    """A llama of four blocks in float32."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    model = architectures.build("llama", num_hidden_layers=4)
    return open_source(open_checkpoint(tiny_models.save_model(folder, model)), CPU)


def recipe_of(variant: dict[str, Any]) -> Recipe:
    """A short recipe; settings of a repair only where it reads them."""
    base = {"pruning.method": "wanda", "finish.method": "none", **SHORT}
    if variant.get("recovery.method", "ebft") != "ebft":
        base = {key: value for key, value in base.items() if key != "recovery.lr"}
    return read_overrides(base | variant)


def press(
    source: LoadedSource,
    out: Path,
    recipe: Recipe,
    state: PassState | None,
    windows: int | None = None,
    *,
    writer: type[CheckpointWriter] = CheckpointWriter,
) -> PassResult:
    """A pass into ``out``, asked to stop after some windows."""
    begun = 0 if state is None else state.windows_done
    committed = out.parent / "state"

    def stop() -> bool:
        return windows is not None and (committed / f"{begun + windows:05d}.json").is_file()

    shards = writer(out, source, torch.bfloat16)
    passed = BlockPass(
        source,
        IDS[:8],
        IDS[8:12],
        IDS[12:],
        recipe=recipe,
        pattern=SparsityPattern.unstructured(0.3),
        ignore=IgnoreRules(()),
        device=CPU,
        stop=stop,
        progress=lambda event: None,
        state=state,
    ).run(shards)
    shards.finish()
    return passed


def state_at(folder: StateFolder, source: LoadedSource) -> PassState:
    """What the folder holds, at its newest commit."""
    return PassState(folder, {}, source, next(folder.commits(), None))


def written(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in out.iterdir()}


def without_times(passed: PassResult) -> list[Any]:
    """What a pass tells of its blocks and stages, without seconds and masks."""
    still = {"elapsed_s": 0.0, "masks": None}
    blocks = [
        replace(
            block,
            elapsed_s=0.0,
            pruning_s=0.0,
            recovery_s=0.0,
            repaired=None if block.repaired is None else replace(block.repaired, **still),
        )
        for block in passed.blocks
    ]
    tuned = [(stage.loss_before, stage.loss_after, stage.best_step, stage.lr) for stage in passed.finetuned]
    return [blocks, passed.perplexities, passed.lr, passed.lr_tried, tuned]


@pytest.mark.parametrize("name", VARIANTS)
def test_pass_that_goes_on_equals_the_one_that_was_never_stopped(
    name: str, source: LoadedSource, tmp_path: Path
) -> None:
    """Stopped after two windows and after three: shards, masks and what it tells are the same."""
    recipe = recipe_of(VARIANTS[name])
    whole = press(source, tmp_path / "whole", recipe, None)
    folder = StateFolder(tmp_path / "state")
    for windows in (2, 1):
        with pytest.raises(StoppedSafely):
            press(source, tmp_path / "stopped", recipe, state_at(folder, source), windows)
        shutil.rmtree(tmp_path / "stopped")
    assert state_at(folder, source).windows_done == 3
    again = press(source, tmp_path / "again", recipe, state_at(folder, source))
    assert written(tmp_path / "again") == written(tmp_path / "whole")
    assert without_times(again) == without_times(whole)


def test_state_keeps_two_commits_and_what_they_name(source: LoadedSource, tmp_path: Path) -> None:
    """Files of older windows go; finished blocks stay."""
    folder = StateFolder(tmp_path / "state")
    press(source, tmp_path / "out", recipe_of({"recovery.window": "overlap"}), state_at(folder, source))
    assert sorted(path.name for path in folder.root.iterdir()) == [
        "00004.json",
        "00005.json",
        *(f"block-{index}.safetensors" for index in range(4)),
        "window-4-open-3.safetensors",
        "window-4-states.safetensors",
        "window-5-states.safetensors",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"windows": 2', '"windows": 3'),
        lambda text: text.replace("window-2-states", "../../window-2-states"),
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: "",
    ],
)
def test_commit_that_is_not_as_it_was_written_is_none(
    change: Any, source: LoadedSource, tmp_path: Path
) -> None:
    """Cut short, altered, pointing elsewhere, or no JSON: it is passed over for the one before."""
    folder = StateFolder(tmp_path / "state")
    with pytest.raises(StoppedSafely):
        press(source, tmp_path / "out", recipe_of({"recovery.window": "block"}), state_at(folder, source), 2)
    newest = folder.root / "00002.json"
    newest.write_text(change(newest.read_text(encoding="utf-8")), encoding="utf-8")
    first, second = folder.commits()
    assert first is None
    assert second is not None
    assert second.content["windows"] == 1


def test_pass_with_states_on_the_disk_commits_the_same_bytes(source: LoadedSource, tmp_path: Path) -> None:
    """No memory for hidden states: the files are those of a pass that had it."""
    recipe = recipe_of(VARIANTS["overlapping windows, rate by trial"])
    (tmp_path / "scratch").mkdir()
    whole = press(source, tmp_path / "whole", recipe, None)
    with limited_activations(0, tmp_path / "scratch"):
        again = press(source, tmp_path / "again", recipe, None)
    assert written(tmp_path / "again") == written(tmp_path / "whole")
    assert without_times(again) == without_times(whole)


class FullDisk(CheckpointWriter):
    """A writer whose disk is full at the second block."""

    def commit(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Refuse the second block."""
        if index == 1:
            raise OSError(28, "No space left on device")
        super().commit(index, block, masks)


@pytest.mark.parametrize("name", ["finish", "tuned end to end", "merged adapters"])
def test_stages_of_all_blocks_are_not_made_twice(
    name: str, source: LoadedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails behind them goes on with their weights, and says of them what it would have said."""
    recipe = recipe_of(VARIANTS.get(name, {"recovery.method": "lora", "recovery.lora.lr": 1e-3}))
    whole = press(source, tmp_path / "whole", recipe, None)
    folder = StateFolder(tmp_path / "state")
    with pytest.raises(OSError, match="No space"):
        press(source, tmp_path / "failed", recipe, state_at(folder, source), writer=FullDisk)
    monkeypatch.setattr(EndToEnd, "tune", None)
    again = press(source, tmp_path / "again", recipe, state_at(folder, source))
    assert written(tmp_path / "again") == written(tmp_path / "whole")
    assert without_times(again) == without_times(whole)
    assert [stage.masks is None for stage in again.finetuned] == [
        stage.masks is None for stage in whole.finetuned
    ]
