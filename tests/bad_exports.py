"""Bad ONNX files for ``compress validate`` and ``compress inspect``, and what each of the two must say.

Each row starts from an export that is right, with its ``.hf`` folder and manifest, and spoils one thing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
from bad_inputs import Bench, Spoil, cut, folder, nothing, write
from tiny_checkpoints import make_tokenizer

GRAPH, DATA = "out/sparse.onnx", "out/sparse.onnx.data"
Refusal = tuple[str, int]

ALTERED: Refusal = ("E-MANIFEST-MISMATCH", 3)


@dataclass(frozen=True)
class BadExport:
    """One thing that is wrong with an export or with how it is asked for.

    Attributes:
        name: What, for the name of the test.
        validate: Id and exit code of ``compress validate``; None where ``inspect`` alone is asked, which reads
            the file with the same code and needs no child process.
        inspect: Those of ``compress inspect``; None where it has nothing to object to, or is not asked.
        says: What message or remedy must name.
        spoil: What is done to the files before.
        options: Options of ``validate``.
        path: The file that is asked about.
    """

    name: str
    validate: Refusal | None
    inspect: Refusal | None
    says: str
    spoil: Spoil = nothing
    options: tuple[str, ...] = ()
    path: str = "{out}"


def flip(name: str, place: int = -9) -> Spoil:
    """Change one byte of a file."""

    def spoil(bench: Bench) -> None:
        content = bytearray((bench.home / name).read_bytes())
        content[place] ^= 1
        (bench.home / name).write_bytes(content)

    return spoil


def bare(spoil: Spoil) -> Spoil:
    """Take the manifest away, which would find everything, and then spoil."""

    def both(bench: Bench) -> None:
        (bench.home / "out" / "sparse.manifest.json").unlink()
        spoil(bench)

    return both


def graph(change: Callable[[onnx.ModelProto], object]) -> Spoil:
    """Change the graph, and take the manifest away."""

    def spoil(bench: Bench) -> None:
        model = onnx.load(bench.out, load_external_data=False)
        change(model)
        bench.out.write_bytes(model.SerializeToString())

    return bare(spoil)


def external(**entries: str) -> Spoil:
    """Set entries of the external data of the graph's first such constant, and take the manifest away."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        kept = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in kept.items():
            tensor.external_data.add(key=key, value=value)

    return graph(change)


def _first_dims(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.dims[0] = 2**45


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def _no_logits(model: onnx.ModelProto) -> None:
    next(port for port in model.graph.output if port.name == "logits").name = "scores"
    next(node for node in model.graph.node if "logits" in node.output).output[0] = "scores"


def _linked_out(bench: Bench) -> None:
    (bench.home / DATA).rename(bench.home / "elsewhere")
    (bench.home / DATA).symlink_to(bench.home / "elsewhere")


def _hard_linked(bench: Bench) -> None:
    os.link(bench.home / DATA, bench.home / "elsewhere")


def _pipe(name: str) -> Spoil:
    def spoil(bench: Bench) -> None:
        (bench.home / name).unlink()
        os.mkfifo(bench.home / name)

    return spoil


def _removed(name: str) -> Spoil:
    return lambda bench: (bench.home / name).unlink()


def _manifest(change: Callable[[dict[str, object]], object]) -> Spoil:
    def spoil(bench: Bench) -> None:
        path = bench.home / "out" / "sparse.manifest.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return spoil


def _alone(bench: Bench) -> None:
    (bench.home / "out" / "sparse.manifest.json").unlink()
    shutil.rmtree(bench.home / "out" / "sparse.hf")


def _foreign_tokenizer(bench: Bench) -> None:
    """Put a tokenizer beside the reference that counts on from what the embedding has."""
    folder = bench.home / "out" / "sparse.hf"
    make_tokenizer().save_pretrained(folder)
    change = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = change["model"]["vocab"]
    change["model"]["vocab"] = {token: place + 60 * (place > 2) for token, place in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(change), encoding="utf-8")


def _altered_files() -> Iterator[BadExport]:
    """What the manifest finds."""
    cut_graph = ("E-ONNX-TRUNCATED", 3)
    yield BadExport("graph cut", ALTERED, cut_graph, "sparse.onnx", cut(GRAPH, -100))
    yield BadExport("graph with one byte altered", ALTERED, None, "sparse.onnx", flip(GRAPH))
    yield BadExport("data with one byte altered", ALTERED, None, "sparse.onnx.data", flip(DATA))
    yield BadExport("data missing", ALTERED, ("E-ONNX-DATA-MISSING", 3), "sparse.onnx.data", _removed(DATA))
    reference = "out/sparse.hf/model-00001-of-00003.safetensors"
    yield BadExport("reference altered", ALTERED, None, "model-00001", flip(reference))
    digest = _manifest(lambda content: content.update(sparsity=0.6))
    yield BadExport("manifest altered", ("E-MANIFEST-DIGEST", 3), None, "digest", digest)
    no_json = write("out/sparse.manifest.json", "{")
    yield BadExport("manifest cut", ("E-MANIFEST-UNREADABLE", 3), None, "sparse.manifest.json", no_json)
    newer = _manifest(lambda content: content.update(schema=99))
    yield BadExport("manifest of another time", ("E-MANIFEST-SCHEMA", 3), None, "99", newer)


def _broken_files() -> Iterator[BadExport]:
    """What is found without a manifest."""
    asked_of_both = ("cut graph", "absent data", "data as link out", "data at an absolute path")
    for name, error_id, says, spoil in (
        ("cut graph", "E-ONNX-TRUNCATED", "sparse.onnx", bare(cut(GRAPH, -100))),
        ("empty graph", "E-ONNX-TRUNCATED", "empty", bare(cut(GRAPH, 0))),
        ("text as graph", "E-ONNX-CORRUPT", "sparse.onnx", bare(write(GRAPH, "no model at all " * 40))),
        ("absent data", "E-ONNX-DATA-MISSING", "sparse.onnx.data", bare(_removed(DATA))),
        ("cut data", "E-ONNX-DATA-TRUNCATED", "sparse.onnx.data", bare(cut(DATA, -1))),
        ("data as pipe", "E-ONNX-DATA-ESCAPES", "regular file", bare(_pipe(DATA))),
        ("data as link out", "E-ONNX-DATA-ESCAPES", "link", bare(_linked_out)),
        ("data with a second name", "E-ONNX-DATA-ESCAPES", "hard link", bare(_hard_linked)),
        ("data at an absolute path", "E-ONNX-DATA-ESCAPES", "/etc/passwd", external(location="/etc/passwd")),
        ("data above the folder", "E-ONNX-DATA-ESCAPES", "../x", external(location="../x")),
        ("data beyond the file", "E-ONNX-DATA-TRUNCATED", "sparse.onnx.data", external(offset=str(2**62))),
        ("data before the file", "E-ONNX-DATA-MALFORMED", "offset", external(offset="-1")),
        ("shape without bounds", "E-ONNX-DATA-MALFORMED", "need", graph(_first_dims)),
        ("data of another length", "E-ONNX-DATA-MALFORMED", "length", external(length="1")),
    ):
        refusal = (error_id, 3)
        yield BadExport(name, refusal if name in asked_of_both else None, refusal, says, spoil)
    operator = graph(_unknown_operator)
    yield BadExport("unknown operator", ("E-ONNX-INVALID", 3), None, "NoSuchOperator", operator)
    signature = ("E-VALIDATE-SIGNATURE", 3)
    yield BadExport("no logits", signature, None, "logits", graph(_no_logits))
    no_masks = bare(cut("out/sparse.hf/masks.safetensors", 40))
    yield BadExport("masks cut", ("E-MASKS-UNREADABLE", 3), None, "masks", no_masks)


def _requests() -> Iterator[BadExport]:
    """What is wrong with the call."""
    absent = "E-ONNX-NOT-FOUND", 3
    yield BadExport("no such file", absent, absent, "no.onnx", path="{home}/no.onnx")
    yield BadExport("folder without a model", absent, absent, "model.onnx", path="{model}")
    yield BadExport("file of a long name", absent, absent, "aaa", path="{home}/" + 300 * "a" + ".onnx")
    yield BadExport("pipe as file", absent, absent, "sparse.onnx", _pipe(GRAPH))
    yield BadExport("file of another kind", absent, None, ".onnx", path="{home}/calibration.jsonl")

    def asked(
        name: str, error_id: str, code: int, says: str, *options: str, spoil: Spoil = nothing
    ) -> BadExport:
        return BadExport(name, (error_id, code), None, says, spoil, options)

    yield asked("unknown check", "E-CHECK-NAME", 2, "parity-prefill", "--require", "nonsense")
    yield asked("unknown provider", "E-PROVIDER-UNKNOWN", 2, "nonsense", "--provider", "nonsense")
    yield asked("nothing to compare with", "E-VALIDATE-NOTHING", 2, "--structure-only", spoil=_alone)
    yield asked("no reference", "E-MODEL-NOT-FOUND", 3, "no folder", "--reference", "{home}/no")
    yield asked("file as reference", "E-MODEL-NOT-FOUND", 3, "is a file", "--reference", "{out}")
    yield asked("no dense model", "E-MODEL-NOT-FOUND", 3, "no folder", "--dense", "{home}/no")
    yield asked("dense model on the hub", "E-HUB-OFFLINE", 7, "HF_HUB_OFFLINE", "--dense", "some/body")
    yield asked("no text", "E-TEXT-NOT-FOUND", 3, "no.txt", "--eval-data", "{home}/no.txt")
    short = write("x.txt", "a")
    yield asked("short text", "E-EVAL-SHORT", 3, "longer", "--eval-data", "{home}/x.txt", spoil=short)
    yield asked("no windows", "E-RECIPE-VALUE", 2, "max_windows", "--max-eval-windows", "0")
    yield asked("gate that is no number", "E-USAGE", 2, "15%", "--max-onnx-ppl-drift", "a lot")
    yield asked("report nowhere", "E-OUTPUT-PARENT", 6, "mkdir -p", "--report", "{home}/no/r.json")
    html = folder("r.html")
    yield asked("report on a folder", "E-OUTPUT-KIND", 6, "r.html", "--report", "{home}/r", spoil=html)
    yield asked("report of a long name", "E-OUTPUT-NOT-WRITABLE", 6, "aaa", "--report", "{home}/" + 300 * "a")
    foreign, text = "E-TOKEN-OUT-OF-RANGE", ("--eval-data", "{home}/evaluation.jsonl")
    yield asked("tokenizer of another model", foreign, 3, "104 rows", *text, spoil=_foreign_tokenizer)
    config = write("out/sparse.hf/config.json", "{")
    yield asked("reference without a config", "E-CONFIG-SYNTAX", 3, "config.json", spoil=config)


EXPORTS = (*_altered_files(), *_broken_files(), *_requests())
