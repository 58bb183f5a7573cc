"""Whether a model is taken to fit: what the estimate counts, and what ``finish: auto`` makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from finetune_samples import CPU, source_of

from compressor import end_to_end
from compressor.end_to_end import finish_for
from compressor.finetuning.memory import Room, room_for
from compressor.planning import as_used
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.sparsity import SparsityPattern

MIB = 2**20


def room(**changes: Any) -> Room:
    """The room for a tiny llama."""
    source = source_of("llama")
    settings = {
        "tokens": 64,
        "hidden_size": 32,
        "vocab_size": 104,
        "stored_tokens": 640,
        "runs_dense": False,
        "device": CPU,
    }
    blocks = [source.block_structure(index) for index in range(source.num_blocks)]
    return room_for(blocks, **{**settings, "free_host_bytes": 4 * 2**30, **changes})


def test_room_counts_parameters_gradients_moments_copy_and_mask() -> None:
    """A second model's worth of blocks costs 21 bytes a parameter and one hidden state per token more."""
    source = source_of("llama")
    block = source.block_structure(0)
    parameters = sum(weight.numel() for weight in block.parameters())
    settings = {
        "tokens": 8,
        "hidden_size": 32,
        "vocab_size": 104,
        "stored_tokens": 8,
        "runs_dense": False,
        "device": CPU,
    }
    one, two = (
        room_for([block] * count, **settings, free_host_bytes=0).needed_bytes  # type: ignore[arg-type]
        for count in (1, 2)
    )
    assert two - one == 21 * parameters + 4 * 8 * 32


@pytest.mark.parametrize("larger", ["tokens", "vocab_size", "stored_tokens"])
def test_room_grows_with_what_takes_memory(larger: str) -> None:
    """More tokens in a batch, a larger vocabulary, more windows: each needs more."""
    assert room(**{larger: 10_000}).needed_bytes > room().needed_bytes


def test_room_counts_a_dense_copy_that_runs_along() -> None:
    """Four bytes for each dense parameter, and its hidden states between blocks."""
    source = source_of("llama")
    parameters = sum(
        w.numel() for i in range(source.num_blocks) for w in source.block_structure(i).parameters()
    )
    more = room(runs_dense=True).needed_bytes - room().needed_bytes
    assert more == 4 * parameters + 4 * 64 * 32 * source.num_blocks


def test_room_leaves_a_fifth() -> None:
    """What needs more than four fifths of what is free does not fit."""
    assert Room(80 * MIB, 100 * MIB).fits
    assert not Room(81 * MIB, 100 * MIB).fits


@pytest.mark.parametrize(
    ("free_bytes", "method", "said"), [(2**36, "kl", "kl taken"), (2**20, "none", "left out")]
)
def test_auto_takes_the_finish_that_fits(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, method: str, said: str
) -> None:
    """Kl where the model fits, none where not, and a sentence with both sizes."""
    monkeypatch.setattr(end_to_end, "available_memory_bytes", lambda: free_bytes)
    recipe = Recipe.model_validate({"finish": {"method": "auto"}})
    chosen, why = finish_for(source_of("llama"), recipe, windows=8, seqlen=16, device=CPU)
    assert chosen == method
    assert why is not None
    assert said in why
    assert "GiB are free on cpu" in why


@pytest.mark.parametrize("recovery", ["none", "dsnot", "lora"])
def test_auto_leaves_other_recoveries_alone(monkeypatch: pytest.MonkeyPatch, recovery: str) -> None:
    """Who names another recovery sees what it does by itself, whatever fits."""
    monkeypatch.setattr("compressor.end_to_end.available_memory_bytes", lambda: 2**40)
    recipe = Recipe.model_validate({"finish": {"method": "auto"}, "recovery": {"method": recovery}})
    assert finish_for(source_of("llama"), recipe, windows=8, seqlen=16, device=CPU) == ("none", None)


@pytest.mark.parametrize(("finish", "epochs"), [("kl", 2), ("none", 10)])
def test_blocks_get_the_passes_that_no_finish_takes(finish: str, epochs: int) -> None:
    """The default repairs for 2 epochs before a finish and for 10 without one; both are 10 passes in all."""
    recipe = as_used(read_recipe(None), SparsityPattern.unstructured(0.5), 64, finish)
    assert recipe.recovery.epochs == epochs
    assert recipe.recovery.epochs + (recipe.finish.epochs if finish == "kl" else 0) == 10


@pytest.mark.parametrize("settings", [{"recovery.epochs": 7}, {"recovery.method": "lora"}])
def test_epochs_that_are_given_count_with_a_finish_too(settings: dict[str, Any]) -> None:
    """``--epochs`` stands in for what the built-in recipe has; other recoveries never read it."""
    recipe = as_used(read_recipe(None, settings), SparsityPattern.unstructured(0.5), 64, "kl")
    assert recipe.recovery.epochs == settings.get("recovery.epochs", 10)


@pytest.mark.parametrize("method", ["none", "kl"])
def test_a_finish_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Who asks for it gets it, without a word, whatever memory there is."""
    monkeypatch.setattr(end_to_end, "available_memory_bytes", lambda: 0)
    recipe = Recipe.model_validate({"finish": {"method": method}})
    device = torch.device("cpu")
    assert finish_for(source_of("llama"), recipe, windows=8, seqlen=16, device=device) == (method, None)
