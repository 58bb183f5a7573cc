"""Models of the hub: what is fetched over HTTP, what comes from the cache, and how each trouble is told."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import MEMBER, STRANGER, FakeHub, Trouble, running_hub
from hub_client import ROOT, Client, fetching

from compressor.fetching import shared_refusal

MODEL = {path.name: path.read_bytes() for path in (ROOT / "examples" / "tiny-llm").iterdir()}
FETCHED = set(MODEL) - {"README.md"}
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub that is gone after the test."""
    with running_hub() as hub:
        yield hub


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    """A user with an empty cache."""
    return Client(hub, tmp_path / "home")


def test_hub_model_is_fetched_with_its_commit(hub: FakeHub, client: Client) -> None:
    """Weights, configs, tokenizer and licence come whole; pickles, code and other formats are not asked for."""
    extras = ("pytorch_model.bin", "training_args.bin", "modeling.py", "onnx/model.onnx", "tf_model.h5")
    commit = hub.publish("models/some/tiny", {**MODEL, **dict.fromkeys(extras, b"not asked for")})
    found = client.fetch("some/tiny")
    assert found["commit"] == commit
    files = {path.name: path.read_bytes() for path in Path(found["folder"]).iterdir()}
    assert files == {name: MODEL[name] for name in FETCHED}
    assert set(hub.sent) == FETCHED


def test_hub_model_code_is_fetched_when_trusted(hub: FakeHub, client: Client) -> None:
    """With --trust-remote-code the Python files at the top come too."""
    hub.publish("models/some/own", {**MODEL, "modeling.py": b"A = 1", "src/more.py": b"B = 2"})
    client.fetch("some/own", code=True)
    assert set(hub.sent) == FETCHED | {"modeling.py"}


def test_hub_model_revision_is_a_tag_a_branch_or_a_commit(hub: FakeHub, client: Client) -> None:
    """Each name of a state leads to its commit and its files; equal files are fetched once."""
    old = hub.publish("models/some/tiny", {**MODEL, "LICENSE": b"old"}, "v1")
    new = hub.publish("models/some/tiny", MODEL, "refs/pr/1")
    wanted = {None: new, "v1": old, "refs/pr/1": new, old: old}
    found = client.ask([fetching("some/tiny", revision=revision) for revision in wanted])
    assert [one["commit"] for one in found] == list(wanted.values())
    licences = [(Path(one["folder"]) / "LICENSE").read_bytes() for one in found]
    assert licences == [MODEL["LICENSE"], b"old", MODEL["LICENSE"], b"old"]
    assert hub.sent.count(WEIGHTS) == 1


def test_hub_model_comes_from_the_cache_when_the_hub_is_gone(hub: FakeHub, client: Client) -> None:
    """What was fetched once opens without the hub, with the same commit, and offline without asking."""
    hub.publish("models/some/tiny", MODEL, "v1")
    found = client.fetch("some/tiny", revision="v1")
    asked = len(hub.asked)
    assert client.ask([fetching("some/tiny", revision="v1")], HF_HUB_OFFLINE="1") == [found]
    assert len(hub.asked) == asked
    hub.close()
    again = [fetching("some/tiny", revision=revision) for revision in ("v1", found["commit"])]
    assert client.ask(again) == [found, found]


def test_hub_model_old_name_leads_to_the_new_one(hub: FakeHub, client: Client) -> None:
    """A name without an owner is asked for on the hub, which knows where it went."""
    commit = hub.publish("models/some/tiny", MODEL)
    hub.moved["models/tiny"] = "some/tiny"
    assert client.fetch("tiny")["commit"] == commit


def test_hub_model_transfer_goes_on_where_it_was_cut(hub: FakeHub, client: Client) -> None:
    """Two broken connections in the middle of a file cost two more requests, and the file is right."""
    hub.publish("models/some/tiny", MODEL)
    hub.troubles[WEIGHTS] = Trouble(after=10_000, times=2)
    found = client.fetch("some/tiny")
    assert (Path(found["folder"]) / WEIGHTS).read_bytes() == MODEL[WEIGHTS]
    assert hub.sent.count(WEIGHTS) == 3


def test_hub_model_that_stays_cut_is_refused_and_can_be_fetched_later(hub: FakeHub, client: Client) -> None:
    """A connection that breaks again and again ends the command; what came is not fetched a second time."""
    hub.publish("models/some/tiny", MODEL)
    hub.troubles[WEIGHTS] = Trouble(after=0)
    refused = client.fetch("some/tiny")
    assert (refused["error_id"], refused["exit_code"]) == ("E-HUB-UNREACHABLE", 7)
    assert refused["message"].startswith(
        "there is no folder some/tiny here; as a hub id it could not be fetched"
    )
    hub.troubles.clear()
    assert "folder" in client.fetch("some/tiny")
    assert hub.sent.count("tokenizer.json") == 1


NO_FOLDER = "there is no folder {} here"
# Repository and revision, token, id, words of the message.
REFUSALS = {
    "not there": ("some/nosuch", "", "E-HUB-NOT-FOUND", NO_FOLDER + ", and the hub has no such model"),
    "plain word": ("nosuch", "", "E-HUB-NOT-FOUND", NO_FOLDER + ", and the hub has no such model"),
    "private": ("some/private", "", "E-HUB-NOT-FOUND", "hides it"),
    "private to others": ("some/private", STRANGER, "E-HUB-NOT-FOUND", "hides it"),
    "gated": ("some/gated", "", "E-HUB-ACCESS", "{} is gated"),
    "gated to others": ("some/gated", STRANGER, "E-HUB-ACCESS", "{} is gated"),
    "unknown token": ("some/public", "hf_unknown", "E-HUB-ACCESS", "does not know the token"),
    "no revision": ("some/public@v9", "", "E-HUB-REVISION", "some/public has no revision v9"),
    "no commit": ("some/public@" + 40 * "0", "", "E-HUB-REVISION", 40 * "0"),
    "forbidden": ("some/forbidden", "", "E-HUB-ACCESS", "the hub forbids it"),
    "down": (
        "some/down",
        "",
        "E-HUB-UNREACHABLE",
        NO_FOLDER + "; as a hub id it could not be fetched: the hub",
    ),
    "too often": ("some/busy", "", "E-HUB-UNREACHABLE", "the hub answered 429"),
    "no answer": ("some/mute", "", "E-HUB-UNREACHABLE", NO_FOLDER),
    "file broken": ("some/half", "", "E-HUB-UNREACHABLE", "the hub answered 500"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each row of the table left."""
    calls = []
    with running_hub() as hub:
        for name in ("public", "private", "gated"):
            hub.publish(f"models/some/{name}", MODEL, visible=name)
        hub.publish("models/some/half", {**MODEL, "half.json": b"{}"})
        hub.troubles["/half.json"] = Trouble(500)
        for name, status in {"forbidden": 403, "down": 503, "busy": 429, "mute": None}.items():
            hub.troubles[f"/some/{name}/revision/main"] = Trouble(status)
        for asked, token, _, _ in REFUSALS.values():
            repository, _, revision = asked.partition("@")
            calls.append(fetching(repository, token, revision=revision or None))
        outcomes = Client(hub, tmp_path_factory.mktemp("home")).ask(calls)
    return dict(zip(REFUSALS, outcomes, strict=True))


@pytest.mark.parametrize("row", REFUSALS)
def test_hub_model_refusals(refused: dict[str, Any], row: str) -> None:
    """Every answer that is no model is told as what it is, and no token is shown."""
    asked, _, error_id, says = REFUSALS[row]
    error = refused[row]
    assert (error["error_id"], error["exit_code"]) == (error_id, 7)
    assert says.format(asked.partition("@")[0]) in error["message"]
    assert "hf_" not in error["message"]


def test_hub_model_refusal_names_the_hub_that_is_gone(hub: FakeHub, client: Client) -> None:
    """A plain word that is no folder is told as that first, then which hub was tried."""
    hub.close()
    refused = client.fetch("nosuch")
    assert refused["error_id"] == "E-HUB-UNREACHABLE"
    assert refused["message"].startswith("there is no folder nosuch here; ")
    assert f"the hub at {hub.endpoint} cannot be reached" in refused["message"]


def test_hub_model_is_fetched_with_the_right_token(hub: FakeHub, client: Client) -> None:
    """Whoever may read a model gets it; the storage of large files is not told the token."""
    commits = [hub.publish(f"models/some/{name}", MODEL, visible=name) for name in ("private", "gated")]
    found = client.ask([fetching("some/private", MEMBER), fetching("some/gated", MEMBER)])
    assert [one["commit"] for one in found] == commits


def test_hub_model_of_pickles_is_refused(hub: FakeHub, client: Client) -> None:
    """Where the weights are pickles only, the first one is named and not fetched."""
    files = {**MODEL, "pytorch_model.bin": MODEL[WEIGHTS]}
    del files[WEIGHTS]
    hub.publish("models/some/old", files)
    refused = client.fetch("some/old")
    assert (refused["error_id"], refused["exit_code"]) == ("E-MODEL-PICKLE", 3)
    assert "some/old has its weights as a pickle only (pytorch_model.bin)" in refused["message"]
    assert "pytorch_model.bin" not in hub.sent


def test_hub_model_that_is_none_is_not_called_pickled(hub: FakeHub, client: Client) -> None:
    """The training arguments beside an adapter and the parts of a pipeline are not weights of a model."""
    hub.publish(
        "models/some/adapter", {"adapter_config.json": b"{}", "config.json": b"{}", "training_args.bin": b"x"}
    )
    hub.publish("models/some/pipeline", {"model_index.json": b"{}", "unet/diffusion_pytorch_model.bin": b"x"})
    found = client.ask([fetching("some/adapter"), fetching("some/pipeline")])
    assert all("folder" in one for one in found)


def test_hub_model_needs_a_cache(hub: FakeHub, client: Client) -> None:
    """A cache folder that cannot be made is told as that, not as a network that is down."""
    hub.publish("models/some/tiny", MODEL)
    client.home.write_text("in the way")
    refused = client.fetch("some/tiny")
    assert (refused["error_id"], refused["exit_code"]) == ("E-CACHE-NOT-WRITABLE", 6)
    assert str(client.home) in refused["message"]
    assert "HF_HOME" in refused["remedy"]


def test_hub_full_disk_is_told(tmp_path: Path) -> None:
    """A disk that is full, however the libraries wrap it, is told as that."""
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
        except OSError as error:
            raise RuntimeError("something went wrong") from error
    except RuntimeError as error:
        refused = shared_refusal(error, "some/tiny", "it")
    assert refused is not None
    assert (refused.error_id, refused.exit_code) == ("E-DISK-FULL", 5)


def test_hub_ids_through_the_whole_command(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    """A run takes model and texts from the hub, and its report says which commit and which split these were."""
    commit = hub.publish("models/some/tiny", MODEL, "v1")
    hub.publish("models/some/tiny", {**MODEL, "config.json": b"spoiled later"})
    rows = "".join(json.dumps({"text": f"Line {number} of a text. " * 9}) + "\n" for number in range(20))
    hub.publish("datasets/some/corpus", dict.fromkeys(("train.jsonl", "test.jsonl"), rows.encode()))
    texts = ("--calibration", "some/corpus", "--eval-data", "some/corpus", "--max-eval-windows", "1")
    small = ("--num-calibration-samples", "2", "--seqlen", "16", "--recovery", "none", "--no-validate")
    model = ("some/tiny", "--revision", "v1", "--out", tmp_path / "sparse.onnx")
    ended = client.compress("run", *model, *texts, *small, "--json", "-q")
    assert (ended.returncode, ended.stderr) == (0, "")
    report = json.loads(ended.stdout)
    assert (report["model"]["name"], report["model"]["revision"]) == ("some/tiny", commit)
    assert report["calibration"]["protocol"]["text"] == "dataset some/corpus/train"
    assert report["perplexity"]["protocol"]["source"] == "some/corpus"
