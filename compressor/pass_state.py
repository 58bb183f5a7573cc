"""What the pass over the blocks needs to go on after a stop, stored window by window.

Finished blocks, and those that wait for an end-to-end stage, are files of their own, written once. A commit adds what
moves on with every window: the hidden states of all streams, the blocks between two overlapping windows, the learning
rate's trials, and what the report will say of each block. All weights and states are stored as they are computed with,
in float32, so that the run that goes on gives the bytes of the one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.block_pruning import PrunedBlock
from compressor.block_result import BlockResult
from compressor.block_windows import OpenBlock
from compressor.finetuning import Finetuned
from compressor.models.source import BlockSource
from compressor.models.structure import BlockStructure, difference, reshape_block
from compressor.recovery.block_io import Repaired
from compressor.run.state import Commit, StateFolder, StoredFile
from compressor.sparsity import Mask
from compressor.streams import Activations

__all__ = ["PassState"]

_WEIGHT, _MASK, _STATES = "weight.", "mask.", "states."
_FINISHED, _TUNED = "block-", "tuned-"  # blocks behind their last window, and behind the end-to-end stages


class PassState:
    """Stores the windows of one pass, and finds the newest one that is whole.

    Args:
        folder: Where the run's state lies.
        facts: What decides the run's result, by name.
        source: The dense blocks, which stored ones are differences of.
        commit: The commit to go on from; None to begin.
    """

    def __init__(
        self,
        folder: StateFolder,
        facts: Mapping[str, Any],
        source: BlockSource,
        commit: Commit | None = None,
    ) -> None:
        self._folder, self._facts, self._source, self._commit = folder, facts, source, commit
        self._content: Mapping[str, Any]
        self._streams_file: StoredFile
        files = {} if commit is None else {file.name: file for file in commit.files}
        self._kind = _FINISHED if self.finetuned is None else _TUNED
        self._blocks = {name: file for name, file in files.items() if name.startswith(self._kind)}
        self._rest = {name: file for name, file in files.items() if name not in self._blocks}

    @property
    def windows_done(self) -> int:
        """How many windows the pass has behind it; 0 at its beginning."""
        return 0 if self._commit is None else int(self._commit.content["windows"])

    @property
    def results(self) -> list[BlockResult]:
        """What is known of the blocks so far."""
        if self._commit is None:
            return []
        return [_result_of(row) for row in self._commit.content["results"]]

    @property
    def probe(self) -> Mapping[str, Any]:
        """The learning rate's trials."""
        assert self._commit is not None
        found: Mapping[str, Any] = self._commit.content["probe"]
        return found

    @property
    def finetuned(self) -> tuple[Finetuned, ...] | None:
        """How the end-to-end stages went; None where they have not been made yet. Masks that they gave up are empty."""
        rows = None if self._commit is None else self._commit.content.get("finetuned")
        return None if rows is None else tuple(_finetuned_of(row) for row in rows)

    def finished_blocks(self) -> list[int]:
        """Indices of the blocks that no window repairs any more, in order."""
        return sorted(int(name.removeprefix(self._kind).partition(".")[0]) for name in self._blocks)

    def store_finished(self, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> None:
        """Keep a block that no window repairs any more.

        Raises:
            OSError, SafetensorError: It cannot be written.
        """
        stored = self._store(f"{_FINISHED}{index}", index, block, masks)
        self._blocks[stored.name] = stored

    def load_finished(self, index: int) -> tuple[nn.Module, dict[str, Mask]]:
        """Such a block, on the device, and its masks; behind the end-to-end stages, where they have been made."""
        return self._load(index, self._blocks[f"{self._kind}{index}.safetensors"])

    def commit(
        self,
        windows: int,
        results: Sequence[BlockResult],
        probe: Mapping[str, Any],
        streams: Mapping[str, Activations],
        open_blocks: Sequence[OpenBlock],
    ) -> None:
        """Make the end of a window the point to go on from.

        Args:
            windows: How many are done.
            results: Of the blocks so far.
            probe: The learning rate's trials.
            streams: Every stream of the pass by name, where it is now.
            open_blocks: Blocks that a later window repairs once more.

        Raises:
            OSError, SafetensorError: It cannot be written; the commit before stands.
        """
        states = {_STATES + name: stream.whole() for name, stream in streams.items()}
        files = [self._folder.store(f"window-{windows}-states", states, {})]
        for opened in open_blocks:
            name = f"window-{windows}-open-{opened.index}"
            files.append(self._store(name, opened.index, opened.block, opened.masks))
        content = {
            "windows": windows,
            "results": [_plain(result) for result in results],
            "probe": dict(probe),
            "open": [_open_row(opened) for opened in open_blocks],
        }
        self._folder.commit(self._facts, content, [*self._blocks.values(), *files])
        self._content, self._streams_file = content, files[0]

    def commit_tuned(
        self, finetuned: Sequence[Finetuned], blocks: Sequence[tuple[nn.Module, Mapping[str, Mask]]]
    ) -> None:
        """Make the end of the end-to-end stages, which follow the last window, the point to go on from.

        Args:
            finetuned: How they went.
            blocks: Every block with its masks.

        Raises:
            OSError, SafetensorError: It cannot be written; the commit before stands.
        """
        files = [
            self._store(f"{_TUNED}{index}", index, block, masks)
            for index, (block, masks) in enumerate(blocks)
        ]
        content = {**self._content, "finetuned": [_finetuned_row(tuned) for tuned in finetuned]}
        self._folder.commit(self._facts, content, [*files, self._streams_file])

    def restore(self, streams: Mapping[str, Activations]) -> None:
        """Set every stream to where it was.

        Raises:
            KeyError: The commit lacks a stream, which equal facts rule out.
        """
        assert self._commit is not None
        self._content = self._commit.content
        self._streams_file = self._rest[f"window-{self.windows_done}-states.safetensors"]
        tensors = self._folder.load_own(self._streams_file)
        for name, stream in streams.items():
            stream.take_share(None if tensors is None else tensors[_STATES + name])

    def open_blocks(self) -> list[OpenBlock]:
        """Blocks that a later window repairs once more, without ``matrices`` and ``io``."""
        assert self._commit is not None
        return [self._open_block(row) for row in self._commit.content["open"]]

    def _open_block(self, row: Mapping[str, Any]) -> OpenBlock:
        index = int(row["index"])
        file = self._rest[f"window-{self.windows_done}-open-{index}.safetensors"]
        block, masks = self._load(index, file)
        return OpenBlock(
            index=index,
            block=block,
            matrices=(),
            pruned=PrunedBlock(masks, tuple(row["notes"])),
            masks=masks,
            io=None,
            came_as={name: torch.Size(shape) for name, shape in row["came_as"].items()},
            loss_before=row["loss_before"],
            repaired=None if row["repaired"] is None else Repaired(**row["repaired"]),
            pruning_s=row["pruning_s"],
            recovery_s=row["recovery_s"],
            elapsed_s=row["elapsed_s"],
        )

    def _store(self, name: str, index: int, block: nn.Module, masks: Mapping[str, Mask]) -> StoredFile:
        tensors = {_WEIGHT + key: weight.detach().cpu() for key, weight in block.named_parameters()}
        tensors |= {_MASK + key: _packed(mask) for key, mask in masks.items()}
        structure = difference(block, self._source.block_structure(index))
        return self._folder.store(name, tensors, {"structure": structure.model_dump_json()})

    def _load(self, index: int, file: StoredFile) -> tuple[nn.Module, dict[str, Mask]]:
        """A stored block, on the device, and its masks."""
        tensors, metadata = self._folder.load(file)
        block = self._source.load_block(index)
        reshape_block(block, BlockStructure.model_validate_json(metadata["structure"]), f"block {index}")
        masks = {}
        with torch.no_grad():
            for name, weight in block.named_parameters():
                weight.copy_(tensors.pop(_WEIGHT + name))
                packed = tensors.pop(_MASK + name, None)
                if packed is not None:
                    masks[name] = _unpacked(packed, weight)
        return block, masks


def _packed(mask: Mask) -> Tensor:
    """A mask as bytes, eight places in each."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def _unpacked(packed: Tensor, weight: Tensor) -> Mask:
    bits = np.unpackbits(packed.numpy(), count=weight.numel()).astype(bool)
    return torch.from_numpy(bits).view(weight.shape).to(weight.device)


def _finetuned_row(tuned: Finetuned) -> dict[str, Any]:
    """A stage in JSON's types, with no more of its masks than whether they are new."""
    return {**asdict(replace(tuned, masks=None)), "masks": tuned.masks is not None}


def _finetuned_of(row: Mapping[str, Any]) -> Finetuned:
    return Finetuned(**{**row, "tried": tuple(row["tried"]), "masks": () if row["masks"] else None})


def _open_row(opened: OpenBlock) -> dict[str, Any]:
    return {
        "index": opened.index,
        "notes": list(opened.pruned.notes),
        "came_as": {name: list(shape) for name, shape in opened.came_as.items()},
        "loss_before": opened.loss_before,
        "repaired": None if opened.repaired is None else asdict(replace(opened.repaired, masks=None)),
        "pruning_s": opened.pruning_s,
        "recovery_s": opened.recovery_s,
        "elapsed_s": opened.elapsed_s,
    }


def _plain(result: BlockResult) -> dict[str, Any]:
    """A result without masks, which the report does not ask for, in JSON's types."""
    repaired = result.repaired
    shapes = {name: [list(before), list(after)] for name, (before, after) in result.shapes.items()}
    plain = replace(result, repaired=None if repaired is None else replace(repaired, masks=None), shapes={})
    return {**asdict(plain), "notes": list(result.notes), "shapes": shapes}


def _result_of(row: Mapping[str, Any]) -> BlockResult:
    repaired = row["repaired"]
    shapes = {
        name: (torch.Size(before), torch.Size(after)) for name, (before, after) in row["shapes"].items()
    }
    return BlockResult(
        **{
            **row,
            "notes": tuple(row["notes"]),
            "repaired": None if repaired is None else Repaired(**repaired),
            "shapes": shapes,
        }
    )
