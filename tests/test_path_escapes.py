"""No name in a file, and no thing in the place of a file, leads a reader out of the folder that it was given."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from bad_bench import time_limit
from onnx import TensorProto, helper
from path_corpus import CANARY, FILE, NAMES, THINGS, nothing_outside
from safetensors.torch import save
from tiny_checkpoints import change_json, write_checkpoint

from compressor.models.checkpoint import open_checkpoint
from compressor.models.weight_files import find_weight_files
from compressor.report.schema import read_report
from compressor.run.output import name_output
from compressor.run.publish import finish_interrupted_publication
from compressor.run.state import StateFolder
from exporters.errors import ReportedError
from exporters.manifest import FileRow, Manifest, check_files, read_manifest, write_manifest
from exporters.masks import read_masks
from exporters.read import read_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and pipes need rights there")
Reader = Callable[
    [Path, str], str | None
]  # folder and name to the id of the refusal, None where it was taken


CANARY_BYTES = save({"w": torch.arange(16, dtype=torch.float32)})
CANARY_ROW = (len(CANARY_BYTES), hashlib.sha256(CANARY_BYTES).hexdigest())


def make_home(place: Path) -> Path:
    """An empty folder, and the canary beside it: a right file of tensors, which a reader that escapes would take."""
    (place / "home").mkdir(parents=True)
    (place / CANARY).write_bytes(CANARY_BYTES)
    return place / "home"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty folder beside the canary."""
    return make_home(tmp_path)


def refusal(read: Callable[[], object]) -> str | None:
    """The id of what ``read`` raises; None where it raises nothing."""
    try:
        read()
    except ReportedError as error:
        return error.error_id if error.remedy else "without a remedy"
    return None


def _external(name: str) -> TensorProto:
    tensor = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location").value = name.encode("utf-8", "replace").decode()
    return tensor


def _model(home: Path, graph: onnx.GraphProto) -> str | None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    (home / "m.onnx").write_bytes(model.SerializeToString())
    return refusal(lambda: [tensor.load() for tensor in read_model(home / "m.onnx").tensors])


def read_initializer(home: Path, name: str) -> str | None:
    """The place of a dense initializer's values."""
    node = helper.make_node("Identity", ["w"], ["y"])
    return _model(home, helper.make_graph([node], "g", [], [], [_external(name)]))


def read_sparse(home: Path, name: str) -> str | None:
    """The place of a sparse initializer's values."""
    indices = helper.make_tensor("i", TensorProto.INT64, [4], [0, 1, 2, 3])
    sparse = onnx.SparseTensorProto(values=_external(name), indices=indices, dims=[8])
    node = helper.make_node("Identity", ["w"], ["y"])
    return _model(home, helper.make_graph([node], "g", [], [], sparse_initializer=[sparse]))


def read_constant(home: Path, name: str) -> str | None:
    """The place of a constant's values inside a branch."""
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=_external(name))], "i", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    return _model(home, helper.make_graph([node], "g", [], []))


def read_manifest_row(home: Path, name: str) -> str | None:
    """A file of a manifest, written and read again where its name allows that."""
    size_bytes, digest = CANARY_ROW
    manifest = Manifest((FileRow(name, digest, size_bytes),), ())
    if name.isprintable():
        write_manifest(manifest, home / "m.json")
        manifest = read_manifest(home / "m.json")
    found = check_files(manifest, home)
    return found[0].error_id if found else None


def read_shard(home: Path, name: str) -> str | None:
    """A shard of an index."""
    index = json.dumps({"weight_map": {"w": name}})
    (home / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return refusal(lambda: find_weight_files(home, "model"))


def read_commit(home: Path, name: str) -> str | None:
    """A file of a commit, whose own hash is right."""
    rows = [[name, *CANARY_ROW]]
    body = {"format": 1, "facts": {}, "content": {}, "files": rows}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (home / "00001.json").write_text(json.dumps({**body, "sha256": digest}), encoding="utf-8")
    return "damaged" if list(StateFolder(home).commits()) == [None] else None


def read_journal(home: Path, name: str) -> str | None:
    """A product that a journal would take away."""
    (home / ".sparse.onnx.staging").mkdir()
    journal = json.dumps({"leaving": [name], "coming": []})
    (home / ".sparse.onnx.staging" / "journal.json").write_text(journal, encoding="utf-8")
    return refusal(lambda: finish_interrupted_publication(name_output(home / "sparse.onnx")))


def read_journal_of_folder(home: Path, name: str) -> str | None:
    """A file that the journal of a folder would take away."""
    (home / "model" / ".blockpress.staging" / "old").mkdir(parents=True)
    journal = json.dumps({"leaving": [name], "coming": []})
    (home / "model" / ".blockpress.staging" / "journal.json").write_text(journal, encoding="utf-8")
    refused = refusal(lambda: finish_interrupted_publication(name_output(home / "model")))
    return refused or "looked for in the folder"


READERS: dict[str, Reader] = {
    "initializer": read_initializer,
    "sparse initializer": read_sparse,
    "constant": read_constant,
    "manifest": read_manifest_row,
    "shard": read_shard,
    "commit": read_commit,
    "journal": read_journal,
    "journal of a folder": read_journal_of_folder,
}


@pytest.mark.parametrize("name", NAMES)
def test_name_leads_nowhere(tmp_path: Path, name: str) -> None:
    """Every reader refuses it, or looks for it in the folder; the file outside is neither opened nor moved."""
    for number, (reader, read) in enumerate(READERS.items()):
        home = make_home(tmp_path / str(number))
        canary = home.parent / CANARY
        filled = NAMES[name].replace("{canary}", str(canary)).replace("{home}", str(home))
        with time_limit(30), nothing_outside(home):
            refused = read(home, filled.replace("{name}", home.name))
        assert refused is not None, reader
        assert canary.read_bytes() == CANARY_BYTES, reader
        assert sorted(path.name for path in home.parent.iterdir()) == sorted([CANARY, "home"]), reader


@pytest.mark.parametrize("thing", THINGS)
def test_thing_in_the_place_of_a_file_is_not_read(tmp_path: Path, thing: str) -> None:
    """A link that leads out, a pipe, a socket or a folder is refused, and nobody waits for it."""
    for number, reader in enumerate(("initializer", "sparse initializer", "constant", "manifest", "commit")):
        home = make_home(tmp_path / str(number))
        THINGS[thing](home / FILE, home.parent / CANARY)
        with time_limit(30), nothing_outside(home):
            assert READERS[reader](home, FILE) is not None, reader


@pytest.mark.parametrize("thing", THINGS)
def test_thing_in_the_place_of_a_list_is_refused(home: Path, thing: str) -> None:
    """The same where manifest, report, masks, model or commit themselves should lie, which may be links."""
    place = home / "00001.json"
    THINGS[thing](place, home.parent / CANARY)
    with time_limit(30):
        for read in (read_manifest, read_report, read_masks, read_model):
            assert refusal(lambda read=read: read(place)) is not None, read
        assert list(StateFolder(home).commits()) == [None]


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "NOTICE"])
def test_thing_in_a_models_folder_is_not_read(home: Path, name: str, thing: str) -> None:
    """A model's folder with a link that leads out, a pipe or a socket among its files is not opened."""
    THINGS[thing](home / name, home.parent / CANARY)
    with time_limit(30), nothing_outside(home):
        refused = refusal(lambda: open_checkpoint(home))
    assert refused in ("E-MODEL-FILE-ESCAPES", "E-MODEL-NOT-FOUND")
    assert refused == "E-MODEL-FILE-ESCAPES" or thing in ("folder", "link in a circle")


def test_links_of_the_hubs_cache_are_read(tmp_path: Path) -> None:
    """The hub's own cache is made of links from a snapshot to the blobs beside it."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    write_checkpoint(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.load_tokenizer()("a").input_ids
    (snapshot / "LICENSE").symlink_to(tmp_path / "models--a--c")
    assert refusal(lambda: open_checkpoint(snapshot)) == "E-MODEL-FILE-ESCAPES"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right model folder, whose tokenizer's config the tests below change."""
    return write_checkpoint(tmp_path_factory.mktemp("model") / "home")


@pytest.mark.parametrize("name", NAMES)
def test_name_in_a_tokenizers_config_leads_nowhere(model: Path, name: str) -> None:
    """A path in a key by which versions of transformers open files is refused; a plain name opens nothing outside."""
    canary = model.parent / CANARY
    canary.write_bytes((model / "tokenizer.json").read_bytes())  # what would be taken
    filled = (
        NAMES[name].replace("{canary}", str(canary)).replace("{home}", str(model)).replace("{name}", "home")
    )
    before = (model / "tokenizer_config.json").read_bytes()
    checkpoint = open_checkpoint(model)
    try:
        for key, value in (("vocab_file", filled), ("fast_tokenizer_files", [filled])):
            (model / "tokenizer_config.json").write_bytes(before)
            change_json(model / "tokenizer_config.json", **{key: value})
            with nothing_outside(model):
                refused = refusal(checkpoint.load_tokenizer)
            path = any(sign in filled for sign in "/\\:") or filled in ("", ".", "..")
            assert refused == "E-CONFIG-UNSAFE" or not path
    finally:
        (model / "tokenizer_config.json").write_bytes(before)
