"""A tiny llama, its texts, and the runs on it that many tests read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models

from compressor import CompressionResult, Recipe, compress
from compressor.progress import Event

FILE_PRODUCTS = {
    "sparse.onnx",
    "sparse.onnx.data",
    "sparse.hf",
    "sparse.report.json",
    "sparse.report.html",
    "sparse.manifest.json",
}


@dataclass
class Workshop:
    """A model, its texts, and runs that are made once and only read by the tests."""

    root: Path
    texts: tiny_models.Texts
    model: Path
    events: list[Event] = field(default_factory=list)
    _made: dict[str, CompressionResult] = field(default_factory=dict)

    @property
    def file_output(self) -> CompressionResult:
        """`--out sparse.onnx`, validated."""
        if "file" not in self._made:
            (self.root / "file").mkdir()
            out = self.root / "file" / "sparse.onnx"
            self._made["file"] = compress(self.model, out, self.recipe(), progress=self.events.append)
        return self._made["file"]

    @property
    def folder_output(self) -> CompressionResult:
        """`--out folder`, validated."""
        if "folder" not in self._made:
            self._made["folder"] = compress(self.model, self.root / "folder", self.recipe())
        return self._made["folder"]

    def recipe(self, **settings: Any) -> Recipe:
        """A short recipe with these dotted settings."""
        return tiny_models.short_recipe(self.texts, **settings)

    def quick(self, out: Path, **settings: Any) -> CompressionResult:
        """A run without validation."""
        return compress(self.model, out, self.recipe(**settings), validate=False)


def open_workshop(root: Path) -> Workshop:
    """A workshop in `root`; nothing is run before it is asked for."""
    model = tiny_models.save_variant(root / "model", "llama", tie_word_embeddings=True)
    (model / "LICENSE").write_text("Do as you like.\n", encoding="utf-8")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    return Workshop(root, tiny_models.write_texts(root), model)


def names_in(folder: Path) -> set[str]:
    """The names of everything in a folder, hidden entries too."""
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder by its relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
