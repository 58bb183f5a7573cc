"""Weights in mapped files: what is given back comes again, what lies elsewhere stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import write_checkpoint

from compressor.models.checkpoint import open_checkpoint
from compressor.models.loading import load_causal_lm
from compressor.models.mapped import MappedFiles
from compressor.models.mapped_model import MappedModel
from compressor.models.reference import reference_of
from compressor.models.source import open_source

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists a program's mappings in /proc")


def mapped_file(folder: Path, *sizes: int) -> tuple[Path, list[torch.Tensor]]:
    """A safetensors file of float32 vectors and views of them in its mapping."""
    path = folder / "w.safetensors"
    tensors = {f"t{number}": torch.arange(size, dtype=torch.float32) for number, size in enumerate(sizes)}
    save_file(tensors, path)
    with safe_open(path, framework="pt") as opened:
        return path, [opened.get_slice(name)[:] for name in tensors]


def resident_kib(tensor: torch.Tensor) -> int:
    """Resident memory of the mapping that holds a tensor's values, as the system counts it."""
    at, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(address, 16) for address in head.split("-"))
            inside = first <= at < last
        elif inside and head == "Rss:":
            return int(line.split()[1])
    raise AssertionError("no mapping holds the tensor")


@linux
def test_pages_given_back_are_not_resident_and_are_read_again(tmp_path: Path) -> None:
    """A megabyte of a mapped file leaves the memory, and holds the file's values at the next touch."""
    path, (tensor,) = mapped_file(tmp_path, 2**20)
    files = MappedFiles([path])
    assert files.holds(tensor)
    total = tensor.sum()
    before = resident_kib(tensor)
    files.give_back([tensor])
    assert before >= 4096
    assert resident_kib(tensor) < 1024
    assert tensor.sum() == total


@linux
def test_giving_back_spares_what_was_written_to_a_neighbour(tmp_path: Path) -> None:
    """Pages that hold a part of another tensor stay: what was written there is not lost."""
    path, (one, two, three) = mapped_file(tmp_path, 5000, 5000, 5000)
    one.fill_(1.0)
    three.fill_(3.0)
    MappedFiles([path]).give_back([two])
    assert torch.equal(two, torch.arange(5000, dtype=torch.float32))
    assert torch.all(one == 1.0)
    assert torch.all(three == 3.0)


def test_giving_back_leaves_other_memory_alone(tmp_path: Path) -> None:
    """A tensor in memory of its own keeps its values, whatever file is named."""
    path, _ = mapped_file(tmp_path, 8)
    tensor = torch.randn(2**16)
    copy = tensor.clone()
    files = MappedFiles([path])
    files.give_back([tensor])
    assert not files.holds(tensor)
    assert torch.equal(tensor, copy)


@linux
def test_source_keeps_blocks_in_the_file_and_out_of_memory(tmp_path: Path) -> None:
    """A block of an open source is a view of its file; the block to work on is memory of its own."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "llama"))
    source = open_source(checkpoint, torch.device("cpu"))
    files = MappedFiles(checkpoint.weights.paths)
    assert all(files.holds(weight) for weight in source.block_structure(1).parameters())
    block = source.load_block(1)
    assert not any(files.holds(weight) for weight in block.parameters())
    for own, stored in zip(block.parameters(), source.block_structure(1).parameters(), strict=True):
        assert torch.equal(own, stored.float())


@pytest.mark.parametrize("variant", ["llama", "mixtral", "gpt2", "bloom"])
def test_mapped_model_fills_one_block_at_a_time(tmp_path: Path, variant: str) -> None:
    """Each block has the checkpoint's values while it is filled, and lies on the meta device before and after."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, variant))
    mapped, whole = MappedModel(checkpoint, torch.float32), load_causal_lm(checkpoint, torch.float32)
    for index, empty in enumerate(mapped.blocks.modules):
        assert all(parameter.is_meta for parameter in empty.parameters())
        expected = dict(whole.get_submodule(mapped.blocks.block_name(index)).named_parameters())
        with mapped.filled(index) as block:
            found = dict(block.named_parameters())
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(parameter.is_meta for parameter in block.parameters())


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe", "falcon"])
def test_reference_that_fills_blocks_as_they_run_gives_the_whole_model_s_logits(
    tmp_path: Path, variant: str
) -> None:
    """Bit for bit, and as often as one asks; also what leaves each block."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, variant))
    reference = reference_of(checkpoint, torch.device("cpu"))
    whole = load_causal_lm(checkpoint, torch.float32)
    ids = torch.arange(12).view(2, 6)
    expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    for _ in range(2):
        assert torch.equal(torch.from_numpy(reference.logits(ids.numpy())), expected)
    outputs = reference.block_outputs(ids.numpy())
    assert [output.shape[:2] for output in outputs] == [(2, 6)] * len(outputs)
