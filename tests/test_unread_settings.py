"""Settings that the chosen methods do not read: each one is told, and what is told has no effect indeed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from finetune_samples import CPU, source_of
from torch import Tensor, nn
from workshop import Workshop

from compressor import compress
from compressor.block_pass import BlockPass
from compressor.linears import IgnoreRules
from compressor.progress import Event, Notice
from compressor.recipe import PruningRecipe, RecoveryRecipe
from compressor.recipe_file import parse_recipe, read_overrides, read_recipe
from compressor.sparsity import Mask, SparsityPattern
from compressor.unread_settings import unread_settings

# Another value for each key that some method does not read.
ANOTHER: Mapping[str, Any] = {
    "pruning.update_weights": False,
    "pruning.column_block": 8,
    "pruning.damping": 0.3,
    "pruning.admm.iterations": 16,
    "pruning.alps.max_iterations": 2,
    "pruning.flap.metric": "IFV",
    "recovery.targets": "block",
    "recovery.loss": "normalized",
    "recovery.first_token": "exclude",
    "recovery.window": "split",
    "recovery.start": "least_squares",
    "recovery.epochs": 2,
    "recovery.batch_size": 3,
    "recovery.lr": 1e-2,
    "recovery.beta1": 0.5,
    "recovery.beta2": 0.5,
    "recovery.eps": 1e-2,
    "recovery.weight_decay": 0.5,
    "recovery.schedule": "constant",
    "recovery.warmup": 0.5,
    "recovery.max_grad_norm": 1e-6,
    "recovery.selection": "heldout",
    "recovery.probe.blocks": 1,
    "recovery.dsnot.update_threshold": 1e9,
    "recovery.dsnot.skip": [],
    "recovery.ebft_mask.lr": 0.1,
    "recovery.lora.rank": 2,
    "recovery.masked_lora.alpha": 1.0,
    "recovery.spp.scale": 1.0,
    "recovery.squarehead.sq": 0.0,
    "recovery.norms.lr": 0.1,
    "finish.epochs": 2,
    "finish.trials.epochs": 1,
}
BASE = {"recovery.epochs": 1, "recovery.batch_size": 2, "recovery.lr": 0.3, "recovery.selection": "last"}


class Committed:
    """Takes finished blocks and keeps a copy of their weights."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def commit(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Keep a copy."""
        self.weights += [weight.clone() for weight in block.parameters()]


def weights_after(settings: Mapping[str, Any]) -> list[Tensor]:
    """Every weight of a tiny llama after a pass with these settings."""
    ids = torch.randint(4, 90, (12, 10), generator=torch.Generator().manual_seed(0))
    committed = Committed()
    BlockPass(
        source_of("llama"),
        ids[:8],
        ids[8:10],
        ids[10:],
        recipe=read_overrides({**BASE, **settings}),
        pattern=SparsityPattern.unstructured(0.5),
        ignore=IgnoreRules(()),
        device=CPU,
        stop=lambda: False,
        progress=lambda event: None,
    ).run(committed)
    return committed.weights


@functools.cache
def usual_weights(pruner: str, recovery: str) -> list[Tensor]:
    """The same with nothing but the methods set."""
    return weights_after({"pruning.method": pruner, "recovery.method": recovery})


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether both are equal bit for bit."""
    return all(map(torch.equal, one, other))


def told_of(settings: Mapping[str, Any]) -> set[str]:
    """The keys that are told to have no effect."""
    lines = unread_settings(read_recipe(None, settings))
    return {key for line in lines for key in line.partition(": ")[2].split(", ")}


@pytest.mark.parametrize(
    ("pruner", "recovery"),
    [
        *(("wanda", method) for method in get_args(RecoveryRecipe.model_fields["method"].annotation)),
        *((method, "none") for method in get_args(PruningRecipe.model_fields["method"].annotation)),
        ("flap", "ebft"),
    ],
)
def test_unread_settings_change_no_weight(pruner: str, recovery: str) -> None:
    """All keys that are told of, set at once to other values, leave the same weights bit for bit."""
    methods = {"pruning.method": pruner, "recovery.method": recovery}
    told = told_of({**ANOTHER, **methods})
    assert told <= ANOTHER.keys()
    assert same(
        weights_after({**{key: ANOTHER[key] for key in told}, **methods}), usual_weights(pruner, recovery)
    )


@pytest.mark.parametrize(
    ("recovery", "keys"),
    [
        ("ebft", "window start targets first_token epochs lr beta1 weight_decay schedule warmup"),
        ("ebft-mask", "targets first_token epochs lr"),
        ("dsnot", "dsnot.update_threshold dsnot.skip"),
        ("lora", "epochs lr lora.rank"),
        ("masked-lora", "epochs masked_lora.alpha"),
        ("spp", "epochs spp.scale"),
        ("squarehead", "weight_decay squarehead.sq"),
        ("norms", "weight_decay"),
    ],
)
def test_unread_settings_leave_out_what_counts(recovery: str, keys: str) -> None:
    """Keys that change a method's weights are not told of beside it."""
    methods = {"pruning.method": "wanda", "recovery.method": recovery}
    methods |= (
        {"recovery.window": "block"} if recovery == "ebft" else {}
    )  # overlap goes with one kind of targets
    for key in (f"recovery.{key}" for key in keys.split()):
        settings = {**methods, key: ANOTHER[key]}
        assert told_of(settings) == set(), key
        assert not same(weights_after(settings), usual_weights("wanda", recovery)), key


def test_unread_settings_are_all_told_where_nothing_is_read() -> None:
    """Without recovery and finish, and with a pruner that has no settings, not one key is left out."""
    methods = {"pruning.method": "magnitude", "recovery.method": "none", "finish.method": "none"}
    assert told_of({**ANOTHER, **methods}) == ANOTHER.keys()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"recovery.method": "lora", "recovery.window": "split"}, "recovery lora: recovery.window"),
        ({"recovery.method": "none", "recovery.epochs": 10}, "recovery none: recovery.epochs"),
        ({"pruning.method": "wanda", "pruning.update_weights": True}, "pruner wanda: pruning.update_weights"),
        ({"pruning.owl": {"m": 3.0}}, "allocation uniform: pruning.owl.m"),
        ({"recovery.targets_blend": 0.1}, "recovery.targets model: recovery.targets_blend"),
        ({"pruning.method": "flap", "recovery.start": "least_squares"}, "pruner flap: recovery.start"),
        (
            {"pruning.method": "flap", "pruning.flap.remove_heads": 2},
            "pruning.flap.structure AL-AM: pruning.flap.remove_heads",
        ),
        (
            {"recovery.method": "ebft-mask", "recovery.probe.epochs": 1},
            "learning rate 0.02: recovery.probe.epochs",
        ),
        (
            {"recovery.method": "spp", "recovery.lr": 0.1, "recovery.spp.lr": 0.2},
            "recovery.lr 0.1: recovery.spp.lr",
        ),
    ],
)
def test_unread_settings_line_names_choice_and_keys(settings: dict[str, Any], line: str) -> None:
    """A key that was typed is told, even with its default value, and what was chosen beside it."""
    assert unread_settings(read_recipe(None, settings)) == (f"of no effect with {line}",)


@pytest.mark.parametrize("recovery", get_args(RecoveryRecipe.model_fields["method"].annotation))
@pytest.mark.parametrize("built_in", ["default", "ebft-paper"])
def test_unread_settings_of_a_built_in_recipe_are_not_told(built_in: str, recovery: str) -> None:
    """Its settings are for its own method; a user who takes another one has set none of them."""
    assert unread_settings(read_recipe(built_in, {"recovery.method": recovery})) == ()


def test_unread_settings_of_a_recipe_file_are_told(tmp_path: Path) -> None:
    """What stands in a file of the user's is the user's; where every key is written out, only what is no default."""
    path = tmp_path / "mine.yaml"
    path.write_text("recovery: {method: dsnot, start: pruned, window: overlap}")
    assert unread_settings(read_recipe(path)) == (
        "of no effect with recovery dsnot: recovery.window, recovery.start",
    )
    whole = read_recipe(None, {"recovery.method": "dsnot", "recovery.window": "overlap"})
    again = parse_recipe(yaml.safe_load(whole.to_yaml()))
    assert unread_settings(again) == (
        "of no effect with recovery dsnot: recovery.window, recovery.epochs_before_finish",
    )


def test_unread_settings_are_told_in_progress_and_report(workshop: Workshop, tmp_path: Path) -> None:
    """A run goes on, tells each line as it starts, and keeps it in the report."""
    events: list[Event] = []
    recipe = workshop.recipe(recovery__method="none", recovery__window="split")
    out = tmp_path / "sparse.onnx"
    result = compress(workshop.model, out, recipe, validate=False, progress=events.append)
    told = [event.message for event in events if isinstance(event, Notice)]
    assert result.report["notices"] == told
    (line,) = told
    choice, _, keys = line.partition(": ")
    assert choice == "of no effect with recovery none"
    assert "recovery.window" in keys.split(", ")
