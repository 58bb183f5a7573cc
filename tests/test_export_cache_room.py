"""A cache with room for tokens to come, extended in place: the logits of a cache that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import VARIANTS, build
from exported_models import cut, padded_tokens
from numpy.typing import NDArray
from runtime_samples import needs_library
from test_export_cached_attention import OPERATORS

from blockpress_runtime import language_model, register
from exporters.attention_function import CACHE_ROOM
from exporters.causal_lm import LoadedParts, build_graph
from exporters.densify import densify
from exporters.read import read_model
from exporters.wire import write_model
from validators.causal_lm import CausalLM
from validators.session import Session

LENGTH = 11
Arrays = dict[str, NDArray[Any]]


def metadata(proto: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


class Model:
    """A tiny model whose attention is one operator, in a session with the library."""

    def __init__(self, name: str, folder: Path) -> None:
        path = folder / "model.onnx"
        graph = build_graph(LoadedParts(build(name)), joined_attention=True)
        write_model(graph.proto, graph.weights, path, "model.onnx.data", encoding="dense")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        register(options)
        self.path, self.proto = path, graph.proto
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [port.name for port in self.session.get_inputs()]
        self.past = [name for name in self.inputs if name.startswith("past_key_values")]

    def feeds(self, tokens: dict[str, torch.Tensor]) -> Arrays:
        return {name: tensor.numpy() for name, tensor in tokens.items() if name in self.inputs}

    def grow(self, tokens: dict[str, torch.Tensor], past: Arrays) -> tuple[NDArray[Any], Arrays]:
        """Logits, and the cache with the new tokens behind the old ones."""
        presents = [name.replace("past_key_values", "present") for name in self.past]
        logits, *values = self.session.run(["logits", *presents], {**self.feeds(tokens), **past})
        return logits, dict(zip(self.past, values, strict=True))

    def extend(
        self, tokens: dict[str, torch.Tensor], cache: Arrays, to: Arrays | None = None
    ) -> NDArray[Any]:
        """Logits; the cache, which has room, is extended, or goes to other memory."""
        binding = self.session.io_binding()
        for name, array in self.feeds(tokens).items():
            binding.bind_cpu_input(name, array)
        for name in self.past:
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(cache[name]))
            target = onnxruntime.OrtValue.ortvalue_from_numpy((to or cache)[name])
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), target)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[-1].numpy())


def with_room(past: Arrays, room: int) -> Arrays:
    """The same caches with so many places, those behind the tokens full of what no token left there."""
    roomy = {}
    for name, array in past.items():
        roomy[name] = np.full((*array.shape[:2], room, array.shape[3]), np.nan, np.float32)
        roomy[name][:, :, : array.shape[2]] = array
    return roomy


@needs_library
@pytest.mark.parametrize("name", [name for name in VARIANTS if OPERATORS[name]])
def test_cache_with_room_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """A prompt with padding, several tokens, then one by one. Not a bit differs, and the room behind stays as it is."""
    model = Model(name, tmp_path)
    assert metadata(model.proto)[CACHE_ROOM] == "1"
    for room in (LENGTH, 40):
        check_room(model, room)


def check_room(model: Model, room: int) -> None:
    """All steps with caches of so many places."""
    tokens = padded_tokens(length=LENGTH)
    grown, past = model.grow(cut(tokens, 0, 5), empty_past(model, tokens))
    cache = with_room(past, room)
    fresh = with_room({key: array[:, :, :0] for key, array in past.items()}, room)
    np.testing.assert_array_equal(model.extend(cut(tokens, 0, 5), fresh), grown)
    for start, stop in ((5, 8), (8, 9), (9, 10), (10, 11)):
        some = cut(tokens, start, stop)
        grown, past = model.grow(some, past)
        np.testing.assert_array_equal(model.extend(some, cache), grown)
        for key, array in past.items():
            np.testing.assert_array_equal(cache[key][:, :, :stop], array)
            assert np.isnan(cache[key][:, :, stop:]).all()
    for key, array in fresh.items():
        np.testing.assert_array_equal(array[:, :, :5], past[key][:, :, :5])


def empty_past(model: Model, tokens: dict[str, torch.Tensor]) -> Arrays:
    batch = len(tokens["input_ids"])
    return {name: np.zeros((batch, 1, 0, 1), np.float32) for name in model.past}


@needs_library
def test_language_models_extend_their_cache_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the runtime and of the validators give the logits of a cache that grows, also where they move it."""
    model = Model("qwen3", tmp_path)
    ids = np.random.default_rng(0).integers(3, 100, (1, 15))
    stops = [(0, 4), (4, 6), *((start, start + 1) for start in range(6, 15))]
    monkeypatch.setattr(language_model, "_LEAST_ROOM", 7)
    generating = language_model.LanguageModel(model.path)
    validated = CausalLM(Session(model.path, "CPU", library=True, threads=1))
    assert validated.has_cache_room
    past = empty_past(model, {"input_ids": torch.from_numpy(ids)})
    roomy = None
    for start, stop in stops:
        mask = np.ones((1, stop), np.int64)
        tokens = {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask,
            "position_ids": np.arange(start, stop)[None],
        }
        grown, past = model.grow({name: torch.from_numpy(array) for name, array in tokens.items()}, past)
        np.testing.assert_array_equal(generating.next_logits(ids[0, start:stop].tolist()), grown[0, -1])
        if roomy is None:
            logits, kept = validated.step(validated.feeds(ids[:, start:stop], mask), {})
            roomy = validated.with_room(kept, 15)
        else:
            logits = roomy.run(validated.feeds(ids[:, start:stop], mask))
        np.testing.assert_array_equal(logits.numpy(), grown)
    assert generating._room == 26  # it was moved when it had room for twelve and the thirteenth came


@needs_library
def test_cache_that_fits_neither_way_is_refused(tmp_path: Path) -> None:
    """Room for less than the mask says: the operator says what it expected."""
    model = Model("llama", tmp_path)
    tokens = padded_tokens(length=LENGTH)
    _, past = model.grow(cut(tokens, 0, 5), empty_past(model, tokens))
    cache = with_room(past, 7)
    with pytest.raises(
        Exception, match="axis 3 of mask is 8, so axis 2 of past_key must be 5, without the 3 new tokens"
    ):
        model.extend(cut(tokens, 5, 8), cache)


@needs_library
def test_room_in_other_memory_is_refused(tmp_path: Path) -> None:
    """A mask that is too short by one would look like room and lose the last token."""
    model = Model("llama", tmp_path)
    tokens = padded_tokens(length=LENGTH)
    _, past = model.grow(cut(tokens, 0, 5), empty_past(model, tokens))
    last = cut(tokens, 4, 5)
    for refused in (lambda: model.grow(last, past), lambda: model.extend(last, past, with_room(past, 5))):
        with pytest.raises(Exception, match="past_key has 5 places, mask says that 4 tokens are past"):
            refused()


@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_standard_attention_has_no_room(name: str) -> None:
    """Its graph reads the number of past tokens from the cache, as always."""
    proto = build_graph(LoadedParts(build(name)), joined_attention=True).proto
    assert CACHE_ROOM not in metadata(proto)


def test_dense_rivals_say_nothing_of_room(tmp_path: Path) -> None:
    """Their attention is standard again."""
    graph = build_graph(LoadedParts(build("llama")), joined_attention=True)
    assert metadata(graph.proto)[CACHE_ROOM] == "1"
    write_model(graph.proto, graph.weights, tmp_path / "model.onnx", "model.onnx.data", encoding="dense")
    densify(read_model(tmp_path / "model.onnx"), tmp_path / "dense.onnx")
    assert CACHE_ROOM not in read_model(tmp_path / "dense.onnx").metadata
