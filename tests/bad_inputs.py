"""Bad models and texts for ``compress run`` and ``export``: what is wrong, and the id and exit code that must come.

Each row starts from inputs that are right (a tiny model, two texts, an older output) and spoils one thing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import change_json, make_tokenizer

WEIGHTS = "model.safetensors"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Bench:
    """The inputs of one command line, all in one folder.

    Attributes:
        home: The folder: ``model``, ``out``, ``calibration.jsonl``, ``evaluation.jsonl``.
    """

    home: Path

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.home / "model"

    @property
    def out(self) -> Path:
        """Where the output shall go; an older one lies there."""
        return self.home / "out" / "sparse.onnx"

    def filled(self, option: str) -> str:
        """``option`` with the places that it names in braces filled in."""
        return option.format(home=self.home, model=self.model, out=self.out)


Spoil = Callable[[Bench], object]


def nothing(_: Bench) -> None:
    """Leave everything as it is."""


@dataclass(frozen=True)
class BadInput:
    """One thing that is wrong.

    Attributes:
        name: What, for the name of the test.
        error_id: The id that must be printed.
        exit_code: What the command must end with.
        says: What message or remedy must name: the file, tensor, field, line or way out.
        options: Options that are added, later ones beating earlier ones; ``{home}`` and the like are filled in.
        spoil: What is done to the inputs before.
        model: The model argument.
        force: Whether ``--force`` is given, so that the older output is no obstacle.
    """

    name: str
    error_id: str
    exit_code: int
    says: str
    options: tuple[str, ...] = ()
    spoil: Spoil = nothing
    model: str = "{model}"
    force: bool = True

    def command_line(self, bench: Bench, command: str) -> list[str]:
        """The arguments of the command that gets this input."""
        usual = ["--out", "{out}", "--eval-data", "{home}/evaluation.jsonl", "--max-eval-windows", "2"]
        if command == "run":
            usual += ["--calibration", "{home}/calibration.jsonl", "--num-calibration-samples", "4"]
            usual += ["--seqlen", "16", "--recovery", "none"]
        force = ["--force"] if self.force else []
        return [bench.filled(word) for word in (command, self.model, *usual, *force, *self.options)]


def write(name: str, content: str | bytes) -> Spoil:
    """Write a file into the bench."""
    octets = content.encode() if isinstance(content, str) else content
    return lambda bench: (bench.home / name).write_bytes(octets)


def folder(name: str) -> Spoil:
    """Make an empty folder in the bench."""
    return lambda bench: (bench.home / name).mkdir()


def config(**changes: object) -> Spoil:
    """Set keys of the model's config.json."""
    return lambda bench: change_json(bench.model / "config.json", **changes)


def config_of(file: str, **changes: object) -> Spoil:
    """Set keys of another JSON file of the model; two underscores lead into an object."""

    def spoil(bench: Bench) -> None:
        content = json.loads((bench.model / file).read_text(encoding="utf-8"))
        for key, value in changes.items():
            *outer, last = key.split("__")
            node = content
            for name in outer:
                node = node[name]
            node[last] = value
        (bench.model / file).write_text(json.dumps(content), encoding="utf-8")

    return spoil


def cut(name: str, keep: int) -> Spoil:
    """Keep the first ``keep`` bytes of a file; a negative number drops as many from its end."""

    def spoil(bench: Bench) -> None:
        path = bench.home / name
        path.write_bytes(path.read_bytes()[:keep])

    return spoil


def _weight(value: float | None) -> Spoil:
    """Put ``value`` into one weight; None stores the tensor as float8."""

    def spoil(bench: Bench) -> None:
        tensors = load_file(bench.model / WEIGHTS)
        if value is None:
            tensors[UP_PROJ] = tensors[UP_PROJ].to(torch.float8_e4m3fn)
        else:
            tensors[UP_PROJ][3, 5] = value
        save_file(tensors, bench.model / WEIGHTS, metadata={"format": "pt"})

    return spoil


def _without_tensor(bench: Bench) -> None:
    tensors = load_file(bench.model / WEIGHTS)
    del tensors[UP_PROJ]
    save_file(tensors, bench.model / WEIGHTS, metadata={"format": "pt"})


def _doubled_header_key(bench: Bench) -> None:
    content = (bench.model / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode()
    entry = json.dumps(json.loads(header)[UP_PROJ])
    text = f'{header.rstrip()[:-1]}, "{UP_PROJ}": {entry}}}'.encode()
    (bench.model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _sharded(*, place: str) -> Spoil:
    """An index that places every tensor in the file ``place``, and no single file."""

    def spoil(bench: Bench) -> None:
        names = load_file(bench.model / WEIGHTS)
        (bench.model / WEIGHTS).rename(bench.model / "a.safetensors")
        index = {"weight_map": dict.fromkeys(names, "a.safetensors") | {UP_PROJ: place}}
        (bench.model / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")

    return spoil


def _larger_tokenizer(bench: Bench) -> None:
    make_tokenizer(120).save_pretrained(bench.model)


def _models() -> Iterator[BadInput]:
    def bad(name: str, error_id: str, says: str, spoil: Spoil) -> BadInput:
        return BadInput(name, error_id, 3, says, (), spoil)

    def named(name: str, error_id: str, says: str, model: str, spoil: Spoil = nothing) -> BadInput:
        return BadInput(name, error_id, 7 if error_id == "E-HUB-OFFLINE" else 3, says, (), spoil, model)

    def pickle_only(bench: Bench) -> None:
        (bench.model / WEIGHTS).rename(bench.model / "pytorch_model.bin")

    def removed(name: str) -> Spoil:
        return lambda bench: (bench.model / name).unlink()

    yield named("folder without a config", "E-MODEL-NOT-FOUND", "config.json", "{home}/x", folder("x"))
    yield bad("folder without weights", "E-MODEL-NOT-FOUND", WEIGHTS, removed(WEIGHTS))
    yield named("file as model", "E-MODEL-NOT-FOUND", "is a file", "{model}/config.json")
    yield named("missing folder", "E-MODEL-NOT-FOUND", "no folder", "{home}/nowhere")
    yield named("name too long", "E-MODEL-NOT-FOUND", "aaa", "{home}/" + 300 * "a")
    yield named("folder of nobody", "E-MODEL-NOT-FOUND", "~nobody", "~nobody-here/model")
    yield named("empty name", "E-MODEL-NOT-FOUND", "hub id", "")
    yield named("no hub id", "E-MODEL-NOT-FOUND", "neither a folder nor a hub id", "a--b/c..d")
    yield named("plain word offline", "E-HUB-OFFLINE", "there is no folder nosuch here", "nosuch")
    yield named("hub id offline", "E-HUB-OFFLINE", "HF_HUB_OFFLINE", "somebody/no-such-model")
    yield bad("pickle only", "E-MODEL-PICKLE", "save_pretrained", pickle_only)
    yield bad("adapter", "E-MODEL-ADAPTER", "merge_and_unload", write("model/adapter_config.json", "{}"))
    bert = config(model_type="bert", architectures=["BertForMaskedLM"])
    yield bad("unsupported architecture", "E-MODEL-UNSUPPORTED", "qwen3_moe", bert)
    yield bad("no model type", "E-MODEL-UNSUPPORTED", "None", config(model_type=None))
    yield bad("model type that is no text", "E-MODEL-UNSUPPORTED", "model_type", config(model_type=[1]))
    seq2seq = config(is_encoder_decoder=True)
    yield bad("encoder", "E-MODEL-UNSUPPORTED", "encoder", seq2seq)
    head = config(architectures=["LlamaForSequenceClassification"])
    yield bad("no language model head", "E-MODEL-UNSUPPORTED", "LlamaForSequenceClassification", head)
    images = config(model_type="llava", vision_config={"hidden_size": 8})
    yield bad("multimodal", "E-MODEL-MULTIMODAL", "vision_config", images)
    awq = config(quantization_config={"quant_method": "awq"})
    yield bad("quantised by config", "E-MODEL-QUANTIZED", "quantization_config", awq)
    yield bad("quantised tensors", "E-MODEL-QUANTIZED", UP_PROJ, _weight(None))
    own = config(model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Model"})
    yield bad("code of its own", "E-MODEL-REMOTE-CODE", "--trust-remote-code", own)
    yield bad("config that is no JSON", "E-CONFIG-SYNTAX", "config.json", cut("model/config.json", 40))
    yield bad("config that is empty", "E-CONFIG-SYNTAX", "config.json", cut("model/config.json", 0))
    yield bad("config that is a list", "E-CONFIG-SYNTAX", "object", write("model/config.json", "[]"))
    yield bad("config not UTF-8", "E-CONFIG-SYNTAX", "utf-8", write("model/config.json", b'{"a": "\xff"}'))
    yield bad("config with a NaN", "E-CONFIG-SYNTAX", "NaN", config(rms_norm_eps=float("nan")))
    yield bad("config key of the loader", "E-CONFIG-UNSAFE", "_post_init", config(_post_init=1))
    yield bad("config that replaces a method", "E-CONFIG-UNSAFE", "to_dict", config(to_dict=1))
    nested = config(text={"trust_remote_code": True})
    yield bad("config that asks for code", "E-CONFIG-UNSAFE", "trust_remote_code", nested)
    yield bad("absurd vocabulary", "E-CONFIG-SIZE", "vocab_size", config(vocab_size=2**40))
    yield bad("vocabulary beyond the weights", "E-CONFIG-SIZE", "vocab_size", config(vocab_size=2**20))
    yield bad("absurd depth", "E-CONFIG-SIZE", "num_hidden_layers", config(num_hidden_layers=10**6))
    yield bad("negative size", "E-CONFIG-SIZE", "hidden_size", config(hidden_size=-32))
    yield bad("size as text", "E-CONFIG-SIZE", "hidden_size", config(hidden_size="32"))
    yield bad("field of the wrong type", "E-CONFIG-INVALID", "rms_norm_eps", config(rms_norm_eps="small"))
    for name, value in (("a number", 3), ("one name", "LlamaForCausalLM"), ("a list of numbers", [3])):
        spoil = config(architectures=value)
        yield bad(f"architectures that is {name}", "E-CONFIG-INVALID", "architectures", spoil)
    heads = config(num_attention_heads=5, num_key_value_heads=2)
    yield bad("heads that do not fit", "E-CONFIG-INVALID", "heads", heads)
    yield bad("unknown activation", "E-CONFIG-INVALID", "nonsense", config(hidden_act="nonsense"))
    yield bad("another width", "E-WEIGHTS-SHAPE", "config.json asks for", config(intermediate_size=48))
    yield bad("more layers than weights", "E-WEIGHTS-MISSING", "model.layers.2", config(num_hidden_layers=3))
    yield bad("weights cut in the header", "E-WEIGHTS-TRUNCATED", WEIGHTS, cut(f"model/{WEIGHTS}", 100))
    yield bad("weights cut in the tensors", "E-WEIGHTS-TRUNCATED", WEIGHTS, cut(f"model/{WEIGHTS}", -1))
    yield bad("weights empty", "E-WEIGHTS-TRUNCATED", WEIGHTS, cut(f"model/{WEIGHTS}", 0))
    yield bad("weights that are text", "E-WEIGHTS-HEADER", WEIGHTS, write(f"model/{WEIGHTS}", "\x20" * 4096))
    yield bad("header with a key twice", "E-WEIGHTS-DUPLICATE", UP_PROJ, _doubled_header_key)
    yield bad("tensor missing", "E-WEIGHTS-MISSING", UP_PROJ, _without_tensor)
    yield bad("shard missing", "E-WEIGHTS-SHARD-MISSING", "b.safetensors", _sharded(place="b.safetensors"))
    yield bad("shard outside", "E-WEIGHTS-INDEX", UP_PROJ, _sharded(place="../b.safetensors"))
    yield bad("weight not a number", "E-WEIGHTS-NONFINITE", UP_PROJ, _weight(float("nan")))
    yield bad("weight infinite", "E-WEIGHTS-NONFINITE", UP_PROJ, _weight(float("-inf")))
    yield bad("no tokenizer", "E-TOKENIZER-NOT-FOUND", "tokenizer.json", removed("tokenizer.json"))
    panic = config_of("tokenizer.json", model__continuing_subword_prefix="/x")
    yield bad("tokenizer that panics", "E-TOKENIZER-NOT-FOUND", "tokenizer.json", panic)
    limit = config_of("tokenizer_config.json", model_max_length="long")
    yield bad("tokenizer with a wrong limit", "E-TOKENIZER-NOT-FOUND", "tokenizer", limit)
    yield bad("tokenizer cut", "E-TOKENIZER-NOT-FOUND", "tokenizer.json", cut("model/tokenizer.json", 500))
    yield bad("tokenizer beyond the embedding", "E-TOKEN-OUT-OF-RANGE", "104", _larger_tokenizer)
    code = write("model/tokenizer_config.json", '{"trust_remote_code": true}')
    yield bad("tokenizer that asks for code", "E-CONFIG-UNSAFE", "tokenizer_config.json", code)


def _texts() -> Iterator[BadInput]:
    line, short = b'{"text": "a"}\n', b"abc def"
    rows: list[tuple[str, str, bytes, str, str]] = [
        ("empty", "x.txt", b"", "*-EMPTY", "x.txt"),
        ("of spaces", "x.txt", b" \n\t \n", "*-EMPTY", "x.txt"),
        ("without documents", "x.jsonl", b"\n\n", "*-EMPTY", "x.jsonl"),
        ("of empty documents", "x.jsonl", b'{"text": ""}\n', "*-EMPTY", "x.jsonl"),
        ("too short", "x.txt", short, "*-SHORT", "longer"),
        ("too short in documents", "x.jsonl", line, "*-SHORT", "longer"),
        ("not UTF-8", "x.txt", b"caf\xe9 " * 200, "E-TEXT-NOT-UTF8", "byte 3 is 0xe9"),
        ("not UTF-8 in a line", "x.jsonl", line + b'{"text": "\xff"}', "E-TEXT-NOT-UTF8", "line 2"),
        ("of half a character", "x.jsonl", b'{"text": "\\ud800"}', "E-TEXT-NOT-UTF8", "document 1"),
        ("with a bad line", "x.jsonl", line * 2 + b'{"text"\n' + line, "E-TEXT-BAD-JSONL", "line 3"),
        ("with a line that is no object", "x.jsonl", line + b"[1]\n", "E-TEXT-BAD-JSONL", "line 2"),
        ("with a number as text", "x.jsonl", line + b'{"text": 1}\n', "E-TEXT-BAD-JSONL", "line 2"),
        ("without the column", "x.jsonl", line + b'{"body": "a"}\n', "E-TEXT-NO-COLUMN", "line 2"),
        ("no parquet", "x.parquet", b"PAR1 but not really", "E-TEXT-BAD-PARQUET", "x.parquet"),
        ("of an unknown format", "x.csv", b"text\nabc\n", "E-TEXT-FORMAT", "x.csv"),
    ]
    for flag, prefix in (("--calibration", "E-CALIBRATION"), ("--eval-data", "E-EVAL")):
        for name, file, content, error_id, says in rows:
            wanted = error_id.replace("*-", f"{prefix}-").replace("E-E-", "E-")
            source = (flag, "{home}/" + file)
            yield BadInput(f"{flag} {name}", wanted, 3, says, source, write(file, content))
        yield BadInput(f"{flag} missing", "E-TEXT-NOT-FOUND", 3, "no.txt", (flag, "{home}/no.txt"))
        long_name = "{home}/" + 300 * "a" + ".txt"
        yield BadInput(f"{flag} of a long name", "E-TEXT-NOT-FOUND", 3, "aaa", (flag, long_name))
        yield BadInput(f"{flag} empty folder", "E-TEXT-NOT-FOUND", 3, "x", (flag, "{home}/x"), folder("x"))
        yield BadInput(f"{flag} without a name", "E-TEXT-NOT-FOUND", 3, "python-docs", (flag, ""))
        yield BadInput(f"{flag} on the hub", "E-HUB-OFFLINE", 7, "HF_HUB_OFFLINE", (flag, "no/such-data"))
    column = ("--text-column", "body")
    yield BadInput("column that nobody has", "E-TEXT-NO-COLUMN", 3, "no column body, but text", column)


MODELS = tuple(_models())
TEXTS = tuple(_texts())
