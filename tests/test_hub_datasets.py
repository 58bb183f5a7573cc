"""Datasets of the hub: which text comes over HTTP, and how each trouble is told."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import MEMBER, STRANGER, FakeHub, Trouble, running_hub
from hub_client import Client, reading

CONFIGS = b"""---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*.parquet}
  - {split: test, path: small/test-*.parquet}
- config_name: large
  data_files:
  - {split: train, path: large/train-*.parquet}
---
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub that is gone after the test."""
    with running_hub() as hub:
        yield hub


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    """A user with an empty cache."""
    return Client(hub, tmp_path / "home")


def lines(*texts: str, column: str = "text") -> bytes:
    """A JSON lines file."""
    return "".join(json.dumps({column: text}) + "\n" for text in texts).encode()


def table(*texts: str) -> bytes:
    """A parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), file)
    return file.getvalue()


def wikitext(hub: FakeHub) -> None:
    """Publish a dataset that is laid out as WikiText is, old name and all."""
    files = {"README.md": CONFIGS, "small/train-0.parquet": table("one", "", "two")}
    files |= {"small/test-0.parquet": table("three", "four"), "large/train-0.parquet": table("five")}
    hub.publish("datasets/Salesforce/wikitext", files)
    hub.moved["datasets/wikitext"] = "Salesforce/wikitext"


def test_hub_dataset_gives_each_role_its_split(hub: FakeHub, client: Client) -> None:
    """Calibration takes train, evaluation test; a part of a split and another column can be named."""
    corpus = {"train.jsonl": lines("a", "b"), "test.jsonl": lines("c")}
    hub.publish("datasets/some/corpus", corpus)
    hub.publish("datasets/some/other", {"train.jsonl": lines("d", column="body")})
    found = client.ask(
        [
            reading("some/corpus"),
            reading("some/corpus", role="evaluation"),
            reading("some/corpus", split="train[1:]"),
            reading("some/other", text_column="body"),
        ]
    )
    assert [one["documents"] for one in found] == [["a", "b"], ["c"], ["b"], ["d"]]
    assert found[2]["description"] == "dataset some/corpus/train[1:]"


def test_hub_dataset_comes_from_the_cache_when_the_hub_is_gone(hub: FakeHub, client: Client) -> None:
    """What was fetched once is read without the hub."""
    hub.publish("datasets/some/corpus", {"train.jsonl": lines("a", "b")})
    found = client.text("some/corpus")
    hub.close()
    again, refused = client.ask([reading("some/corpus"), reading("nosuch")])
    assert again == found
    assert (refused["error_id"], refused["exit_code"]) == ("E-HUB-UNREACHABLE", 7)
    assert refused["message"].startswith("there is no file or folder nosuch here; ")
    assert f"the hub at {hub.endpoint} cannot be reached" in refused["message"]


def test_hub_dataset_of_lines_is_one_text(hub: FakeHub, client: Client) -> None:
    """WikiText's rows are joined as the published perplexities join them, under its old name too."""
    wikitext(hub)
    found = client.ask(
        [
            reading("Salesforce/wikitext", dataset_config="small", split="test"),
            reading("wikitext", dataset_config="small"),
        ]
    )
    assert [one["documents"] for one in found] == [["three\n\nfour"], ["one\n\n\n\ntwo"]]
    assert {one["kind"] for one in found} == {"text"}
    assert not [address for address in hub.asked if address.endswith("/large/train-0.parquet")]


def test_hub_dataset_that_is_large_is_streamed(hub: FakeHub, client: Client) -> None:
    """Of a dataset too large to fetch, the first rows are read off the hub, and the description says so."""
    hub.publish("datasets/some/huge", {"train.jsonl": lines(*map(str, range(20_010)))})
    hub.repositories["datasets/some/huge"].claimed["train.jsonl"] = 3 * 2**30
    found = client.text("some/huge")
    assert found["documents"] == [str(number) for number in range(20_000)]
    assert found["description"] == "dataset some/huge/train, first 20000 rows"
    assert not list(client.home.rglob("*.arrow"))


def test_hub_dataset_transfer_goes_on_where_it_was_cut(hub: FakeHub, client: Client) -> None:
    """A connection that breaks in the middle of a file costs one more request."""
    texts = [f"document {number}" for number in range(100)]
    hub.publish("datasets/some/corpus", {"train.jsonl": lines(*texts)})
    hub.troubles["/train.jsonl"] = Trouble(after=50, times=1)
    assert client.text("some/corpus")["documents"] == texts


def test_hub_dataset_is_read_with_the_right_token(hub: FakeHub, client: Client) -> None:
    """Whoever may read a dataset gets it."""
    for name in ("private", "gated"):
        hub.publish(f"datasets/some/{name}", {"train.parquet": table(name)}, visible=name)
    found = client.ask([reading("some/private", MEMBER), reading("some/gated", MEMBER)])
    assert [one["documents"] for one in found] == [["private"], ["gated"]]


NO_FILE = "there is no file or folder {} here"
# Dataset and its configuration, token, id, exit code, words of the message.
REFUSALS = {
    "not there": ("some/nosuch", "", "E-DATASET-NOT-FOUND", 7, NO_FILE + ", and the hub has no such dataset"),
    "plain word": ("nosuch", "", "E-DATASET-NOT-FOUND", 7, NO_FILE + ", and the hub has no such dataset"),
    "private": ("some/private", "", "E-DATASET-NOT-FOUND", 7, "hides it"),
    "private to others": ("some/private", STRANGER, "E-DATASET-NOT-FOUND", 7, "hides it"),
    "gated": ("some/gated", "", "E-HUB-ACCESS", 7, "{} is gated"),
    "gated to others": ("some/gated", STRANGER, "E-HUB-ACCESS", 7, "{} is gated"),
    "unknown token": ("some/public", "hf_unknown", "E-HUB-ACCESS", 7, "does not know the token"),
    "forbidden": ("some/forbidden", "", "E-HUB-ACCESS", 7, "the hub forbids it"),
    "down": ("some/down", "", "E-HUB-UNREACHABLE", 7, NO_FILE + "; as a dataset of the hub it could not be"),
    "cut": ("some/cut", "", "E-HUB-UNREACHABLE", 7, NO_FILE + "; as a dataset of the hub it could not be"),
    "script": ("some/script", "", "E-DATASET-SCRIPT", 3, "{} is a dataset that needs a script"),
    "no files": ("some/movie-scripts", "", "E-TEXT-NOT-FOUND", 3, "has no files that can be read"),
    "no parquet": ("some/broken", "", "E-TEXT-NOT-FOUND", 3, "cannot be read"),
    "no configuration": ("Salesforce/wikitext", "", "E-DATASET-CONFIG", 2, "['small', 'large']"),
    "other configuration": ("Salesforce/wikitext:tiny", "", "E-DATASET-CONFIG", 2, "'tiny' not found"),
    "no split": ("some/public@dev", "", "E-DATASET-SPLIT", 2, "dev"),
    "no column": ("some/columns", "", "E-TEXT-NO-COLUMN", 3, "no column text, but body"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each row of the table left."""
    calls = []
    with running_hub() as hub:
        for name in ("public", "private", "gated", "forbidden", "down", "cut"):
            visible = name if name in ("private", "gated") else "public"
            hub.publish(f"datasets/some/{name}", {f"{name}.jsonl": lines(*"abc")}, visible=visible)
        hub.publish("datasets/some/script", {"script.py": b"raise SystemExit"})
        hub.publish("datasets/some/movie-scripts", {"README.md": b"nothing else"})
        hub.publish("datasets/some/broken", {"train.parquet": b"PAR1 no"})
        hub.publish("datasets/some/columns", {"train.jsonl": lines("a", column="body")})
        wikitext(hub)
        for name, trouble in {
            "forbidden": Trouble(403),
            "down": Trouble(503),
            "cut": Trouble(after=9),
        }.items():
            hub.troubles[f"/{name}.jsonl"] = trouble
        for asked, token, *_ in REFUSALS.values():
            source, _, split = asked.partition("@")
            source, _, config = source.partition(":")
            calls.append(reading(source, token, dataset_config=config or None, split=split or None))
        outcomes = Client(hub, tmp_path_factory.mktemp("home")).ask(calls)
    return dict(zip(REFUSALS, outcomes, strict=True))


@pytest.mark.parametrize("row", REFUSALS)
def test_hub_dataset_refusals(refused: dict[str, Any], row: str) -> None:
    """Every answer that is no text is told as what it is, and no token is shown."""
    asked, _, error_id, exit_code, says = REFUSALS[row]
    error = refused[row]
    assert (error["error_id"], error["exit_code"]) == (error_id, exit_code)
    assert says.format(asked) in error["message"]
    assert "hf_" not in error["message"]
