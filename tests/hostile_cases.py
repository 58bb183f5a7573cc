"""More that can be wrong: files made to mislead, links, pipes and devices.

Each row is one command line over the bench of ``bad_inputs``, one thing spoiled, and the id and exit code that must
come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bad_inputs import UP_PROJ, WEIGHTS, Bench, Spoil, config, config_of, nothing, write
from safetensors.torch import load_file, save_file
from tiny_checkpoints import change_json

INDEX = f"{WEIGHTS}.index.json"
BOMB = "".join(f"x{n}: &x{n} [{', '.join(9 * ([f'*x{n - 1}'] if n else ['x']))}]\n" for n in range(9))


RUN = (
    "run", "{model}", "--out", "{out}", "--force", "--eval-data", "{home}/evaluation.jsonl", "--max-eval-windows", "2",
    "--calibration", "{home}/calibration.jsonl", "--seqlen", "16", "--num-calibration-samples", "4", "--recovery",
    "none",
)  # fmt: skip


@dataclass(frozen=True)
class HostileCase:
    """One command line and what it must end with.

    Attributes:
        name: What is wrong.
        error_id: The id that must be printed.
        exit_code: What the command must end with.
        says: What message or remedy must name.
        words: The command line; ``{home}``, ``{model}`` and ``{out}`` are filled in.
        spoil: What is done to the files before.
    """

    name: str
    error_id: str
    exit_code: int
    says: str
    words: tuple[str, ...]
    spoil: Spoil = nothing

    def command_line(self, bench: Bench) -> list[str]:
        """The arguments."""
        return [bench.filled(word) for word in self.words]


def run_case(
    name: str, error_id: str, code: int, says: str, spoil: Spoil = nothing, *options: str
) -> HostileCase:
    """A case of ``compress run`` with the usual options."""
    return HostileCase(name, error_id, code, says, (*RUN, *options), spoil)


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change the header of the weights, and leave what follows it."""

    def spoil(bench: Bench) -> None:
        content = (bench.model / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        told = json.loads(content[8 : 8 + length])
        changed = change(told)
        text = json.dumps(told if changed is None else changed).encode()
        (bench.model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return spoil


def entry(**fields: object) -> Spoil:
    """Set fields of one tensor in the header of the weights."""
    return header(lambda told: told[UP_PROJ].update(fields) or told)


def index(change: Callable[[dict[str, str]], object]) -> Spoil:
    """Split the weights into two shards with an index, then change its ``weight_map``."""

    def spoil(bench: Bench) -> None:
        tensors = load_file(bench.model / WEIGHTS)
        (bench.model / WEIGHTS).unlink()
        parts: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
        for place, (name, tensor) in enumerate(sorted(tensors.items())):
            parts["ab"[place % 2] + ".safetensors"][name] = tensor
        for name, part in parts.items():
            save_file(part, bench.model / name, metadata={"format": "pt"})
        weight_map = {name: file for file, part in parts.items() for name in part}
        changed = change(weight_map)
        content = {"weight_map": weight_map if changed is None else changed}
        (bench.model / INDEX).write_text(json.dumps(content), encoding="utf-8")

    return spoil


def linked(name: str, target: str) -> Spoil:
    """Put a link in the place of a file of the model."""

    def spoil(bench: Bench) -> None:
        (bench.model / name).parent.mkdir(exist_ok=True)
        (bench.model / name).unlink(missing_ok=True)
        (bench.model / name).symlink_to(bench.filled(target))

    return spoil


def pipe(name: str) -> Spoil:
    """Put a named pipe, on which a reader waits for ever, in the place of a file."""

    def spoil(bench: Bench) -> None:
        (bench.home / name).unlink(missing_ok=True)
        os.mkfifo(bench.home / name)

    return spoil


def _hole(told: dict[str, Any]) -> None:
    """Move every tensor behind the first by eight bytes."""
    for name, fields in told.items():
        if name != "__metadata__" and fields["data_offsets"][0]:
            fields["data_offsets"] = [offset + 8 for offset in fields["data_offsets"]]


def _overlap(told: dict[str, Any]) -> None:
    """Let one tensor begin where another begins."""
    first = next(fields for name, fields in told.items() if name not in ("__metadata__", UP_PROJ))
    length = told[UP_PROJ]["data_offsets"][1] - told[UP_PROJ]["data_offsets"][0]
    told[UP_PROJ]["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + length]


def _nested(told: dict[str, Any]) -> list[Any]:
    nest: list[Any] = []
    for _ in range(500):
        nest = [nest]
    return nest


def _safetensors() -> Iterator[HostileCase]:
    def bad(name: str, error_id: str, says: str, spoil: Spoil) -> HostileCase:
        return run_case(name, error_id, 3, says, spoil)

    place = f"model/{WEIGHTS}"
    yield bad("weights with a hole", "E-WEIGHTS-HEADER", "begins at byte", header(_hole))
    yield bad("weights that overlap", "E-WEIGHTS-HEADER", "begins at byte", header(_overlap))

    def longer(bench: Bench) -> None:
        with (bench.home / place).open("ab") as stream:
            stream.write(b"\0" * 8)

    yield bad("weights with bytes behind them", "E-WEIGHTS-HEADER", "belong to no tensor", longer)
    endless = write(place, (2**63).to_bytes(8, "little") + b"{}")
    yield bad("header of 2^63 bytes", "E-WEIGHTS-HEADER", "header would have", endless)
    longest = write(place, (2**20).to_bytes(8, "little") + b"{}")
    yield bad("header longer than the file", "E-WEIGHTS-TRUNCATED", "within its header", longest)
    yield bad("header that is a list", "E-WEIGHTS-HEADER", "no JSON object", header(lambda told: [told]))
    yield bad("header that nests", "E-WEIGHTS-HEADER", "no JSON object", header(_nested))
    yield bad(
        "header not UTF-8", "E-WEIGHTS-HEADER", "no JSON", write(place, b"\2" + b"\0" * 7 + b"\xff\xfe")
    )
    yield bad("offset of 2^62", "E-WEIGHTS-HEADER", "does not fill", entry(data_offsets=[0, 2**62]))
    yield bad("offset below zero", "E-WEIGHTS-HEADER", UP_PROJ, entry(data_offsets=[-8, 8]))
    yield bad("offset that is a text", "E-WEIGHTS-HEADER", UP_PROJ, entry(data_offsets=["0", "8"]))
    yield bad("offsets turned round", "E-WEIGHTS-HEADER", UP_PROJ, entry(data_offsets=[8, 0]))
    yield bad("offset alone", "E-WEIGHTS-HEADER", UP_PROJ, entry(data_offsets=[0]))
    yield bad("side below zero", "E-WEIGHTS-HEADER", UP_PROJ, entry(shape=[-32, 32]))
    yield bad("sides of 2^40 and 2^40", "E-WEIGHTS-HEADER", "does not fill", entry(shape=[2**40, 2**40]))
    yield bad("side that is a fraction", "E-WEIGHTS-HEADER", UP_PROJ, entry(shape=[32.0, 32]))
    yield bad("no shape", "E-WEIGHTS-HEADER", UP_PROJ, entry(shape=None))
    yield bad("type that nobody has", "E-WEIGHTS-HEADER", "OBJECT", entry(dtype="OBJECT"))
    yield bad("type that is a list", "E-WEIGHTS-HEADER", "dtype", entry(dtype=["F32"]))
    scalar = header(lambda told: {**told, UP_PROJ: 7})
    yield bad("tensor that is a number", "E-WEIGHTS-HEADER", UP_PROJ, scalar)

    def overflowing(bench: Bench) -> None:
        tensors = load_file(bench.home / place)
        tensors[UP_PROJ][0, 0] = 1e30
        save_file(tensors, bench.home / place, metadata={"format": "pt"})

    narrow = ("--dtype", "float16")
    yield run_case("weight beyond float16", "E-WEIGHTS-OVERFLOW", 3, "bfloat16", overflowing, *narrow)

    def pickled(bench: Bench) -> None:
        (bench.home / place).unlink()
        torch.save({"x": torch.ones(1)}, bench.model / "pytorch_model-00001-of-00002.bin")

    yield bad("pickled shards", "E-MODEL-PICKLE", "save_pretrained", pickled)


def _indexes() -> Iterator[HostileCase]:
    def bad(name: str, error_id: str, says: str, spoil: Spoil) -> HostileCase:
        return run_case(f"index {name}", error_id, 3, says, spoil)

    def indexed(text: str) -> Spoil:
        def spoil(bench: Bench) -> None:
            (bench.model / WEIGHTS).unlink()
            (bench.model / INDEX).write_text(text, encoding="utf-8")

        return spoil

    yield bad("that is no JSON", "E-CONFIG-SYNTAX", INDEX, indexed("{"))
    yield bad("that is a list", "E-CONFIG-SYNTAX", INDEX, indexed("[]"))
    yield bad("with a key twice", "E-CONFIG-SYNTAX", "twice", indexed('{"weight_map": {}, "weight_map": {}}'))
    yield bad("of nothing", "E-WEIGHTS-INDEX", "no weight_map", indexed('{"weight_map": {}}'))
    yield bad("whose map is a list", "E-WEIGHTS-INDEX", "no weight_map", indexed('{"weight_map": ["a"]}'))
    number = index(lambda names: names.update({UP_PROJ: 7}))
    yield bad("with a number as shard", "E-WEIGHTS-INDEX", "'7'", number)
    pickle = index(lambda names: names.update({UP_PROJ: "a.bin"}))
    yield bad("with a pickle as shard", "E-WEIGHTS-INDEX", "a.bin", pickle)
    stranger = index(lambda names: names.update({"model.extra": "a.safetensors"}))
    yield bad("that promises too much", "E-WEIGHTS-INDEX", "model.extra", stranger)
    missing = index(lambda names: {**names, UP_PROJ: "c.safetensors"})
    yield bad("with a missing shard", "E-WEIGHTS-SHARD-MISSING", "c.safetensors", missing)

    def doubled(bench: Bench) -> None:
        index(lambda names: None)(bench)
        one, two = (load_file(bench.model / f"{letter}.safetensors") for letter in "ab")
        shared = sorted(one)[0]
        save_file({**two, shared: one[shared]}, bench.model / "b.safetensors", metadata={"format": "pt"})

    yield bad("with a tensor in two shards", "E-WEIGHTS-DUPLICATE", "shard before", doubled)


def _configs() -> Iterator[HostileCase]:
    def bad(name: str, error_id: str, says: str, spoil: Spoil) -> HostileCase:
        return run_case(name, error_id, 3, says, spoil)

    kernel = config(_attn_implementation="somebody/kernel")
    yield bad("config that names a kernel", "E-CONFIG-UNSAFE", "somebody/kernel", kernel)
    kernel = config(attn_implementation="paged|somebody/kernel:x")
    yield bad("config that names a kernel openly", "E-CONFIG-UNSAFE", "somebody/kernel", kernel)
    yield bad("config that asks for kernels", "E-CONFIG-UNSAFE", "use_kernels", config(use_kernels=True))
    other = config(transformers_weights="other.safetensors")
    yield bad("config that names other weights", "E-CONFIG-UNSAFE", "other.safetensors", other)
    yield bad("config with a map that is a list", "E-CONFIG-UNSAFE", "auto_map", config(auto_map=["a.B"]))
    hidden = config(text_config={"x": [{"_init_weights": "y"}]}, vision=None)
    yield bad("config key of the loader below", "E-CONFIG-UNSAFE", "_init_weights", hidden)
    twice = write("model/config.json", '{"model_type": "llama", "model_type": "gpt2"}')
    yield bad("config with a key twice", "E-CONFIG-SYNTAX", "twice", twice)
    deep = write("model/config.json", '{"a": ' * 40 + "1" + "}" * 40)
    yield bad("config that nests", "E-CONFIG-SYNTAX", "nested", deep)
    endless = write("model/config.json", "[" * 200_000)
    yield bad("config that nests without end", "E-CONFIG-SYNTAX", "config.json", endless)
    digits = write("model/config.json", f'{{"vocab_size": {"9" * 5000}}}')
    yield bad("config with a number of 5000 digits", "E-CONFIG-SYNTAX", "config.json", digits)
    large = write("model/config.json", " " * (17 * 2**20))
    yield bad("config of 17 MiB", "E-CONFIG-SYNTAX", "larger", large)
    for name, value in (("zero", 0), ("true", True), ("a fraction", 2.5), ("none", [])):
        spoil = config(num_hidden_layers=value)
        yield bad(f"depth of {name}", "E-CONFIG-SIZE", "num_hidden_layers", spoil)
    yield bad("number beyond 2^53", "E-CONFIG-SIZE", "head_scale", config(head_scale=2**60))
    experts = config(num_local_experts=10**9)
    yield bad("absurd number of experts", "E-CONFIG-SIZE", "num_local_experts", experts)
    positions = config(max_position_embeddings=10**12)
    yield bad("absurd length", "E-CONFIG-SIZE", "max_position_embeddings", positions)
    structure = config(blockpress_structure={"version": 1})
    yield bad("structure that is cut", "E-STRUCTURE-INVALID", "type_without", structure)
    structure = config(model_type="blockpress_llama")
    yield bad("structure that is missing", "E-STRUCTURE-INVALID", "blockpress_structure", structure)


def _tokenizers() -> Iterator[HostileCase]:
    def bad(name: str, error_id: str, says: str, spoil: Spoil) -> HostileCase:
        return run_case(f"tokenizer {name}", error_id, 3, says, spoil)

    def setting(**changes: object) -> Spoil:
        return lambda bench: change_json(bench.model / "tokenizer_config.json", **changes)

    unsafe = "E-CONFIG-UNSAFE"
    yield bad("file elsewhere", unsafe, "/etc/passwd", setting(tokenizer_file="/etc/passwd"))
    yield bad("vocabulary elsewhere", unsafe, "../x", setting(vocab_file="../x"))
    version = setting(fast_tokenizer_files=["../tokenizer.1.0.0.json"])
    yield bad("of another version elsewhere", unsafe, "../tokenizer.1.0.0.json", version)
    yield bad("config that is no JSON", "E-CONFIG-SYNTAX", "tokenizer_config.json", cut_config)
    yield bad(
        "config that is a list", "E-CONFIG-SYNTAX", "object", write("model/tokenizer_config.json", "[]")
    )
    broken = "E-TOKENIZER-NOT-FOUND"
    yield bad("that is empty", broken, "tokenizer", write("model/tokenizer.json", ""))
    yield bad("that is a list", broken, "tokenizer", write("model/tokenizer.json", "[]"))
    yield bad("without a model", broken, "tokenizer", config_of("tokenizer.json", model=None))
    yield bad("with ids as text", broken, "tokenizer", config_of("tokenizer.json", model__vocab={"a": "1"}))
    beyond = config_of("tokenizer.json", model__vocab__b=2**31)
    yield bad("with ids of 2^31", "E-TOKEN-OUT-OF-RANGE", "rows", beyond)


def cut_config(bench: Bench) -> None:
    """Cut the tokenizer's config."""
    (bench.model / "tokenizer_config.json").write_text('{"a": ', encoding="utf-8")


def _strays() -> Iterator[HostileCase]:
    """Links, pipes and devices in the place of files of the model."""

    def bad(name: str, says: str, spoil: Spoil, error_id: str = "E-MODEL-FILE-ESCAPES") -> HostileCase:
        return run_case(name, error_id, 3, says, spoil)

    secret = "{home}/secret"
    for name in ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        yield bad(f"{name} linked out", f"{name} is a link", linked(name, secret))
        yield bad(f"{name} a pipe", f"{name} is no regular file", pipe(f"model/{name}"))
    yield bad("weights a device", "is a link", linked(WEIGHTS, "/dev/zero"))
    yield bad("licence the environment", "is a link", linked("NOTICE", "/proc/self/environ"))
    yield bad("generation config a device", "is a link", linked("generation_config.json", "/dev/zero"))
    yield bad("chat template linked out", "is a link", linked("chat_template.jinja", secret))
    template = "additional_chat_templates/x.jinja"
    yield bad("chat template below linked out", "is a link", linked(template, secret))
    yield bad("link in a circle", "config.json", linked("config.json", "config.json"), "E-MODEL-NOT-FOUND")


def _texts() -> Iterator[HostileCase]:
    for flag in ("--calibration", "--eval-data"):
        source = (flag, "{home}/p.txt")
        yield run_case(f"{flag} a pipe", "E-TEXT-NOT-FOUND", 3, "p.txt", pipe("p.txt"), *source)
        device = (flag, "/dev/zero")
        yield run_case(f"{flag} a device", "E-TEXT-NOT-FOUND", 3, "/dev/zero", nothing, *device)
        wide = write("p.txt", "words in sixteen bits".encode("utf-16"))
        yield run_case(f"{flag} in UTF-16", "E-TEXT-NOT-UTF8", 3, "byte 0", wide, *source)
        lines = (flag, "{home}/p.jsonl")
        deep = write("p.jsonl", '{"text": ' + "[" * 100_000)
        yield run_case(f"{flag} that nests", "E-TEXT-BAD-JSONL", 3, "line 1", deep, *lines)
        digits = write("p.jsonl", f'{{"text": {"9" * 5000}}}')
        yield run_case(f"{flag} of 5000 digits", "E-TEXT-BAD-JSONL", 3, "line 1", digits, *lines)


def _dataset_folders() -> Iterator[HostileCase]:
    secret, given = "{home}/secret", ("--calibration", "{home}/texts")

    def bad(name: str, says: str, spoil: Spoil) -> HostileCase:
        def both(bench: Bench) -> None:
            (bench.home / "texts").mkdir()
            (bench.home / "texts" / "a.txt").write_text("a text", encoding="utf-8")
            spoil(bench)

        return run_case(f"dataset {name}", "E-DATASET-ESCAPES", 3, says, both, *given)

    yield bad("with a link out", "b.txt is a link", linked("../texts/b.txt", secret))
    yield bad("with a pipe", "b.txt is no regular file", pipe("texts/b.txt"))
    card = "---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n"
    for name in ("/etc/*.conf", "../secret", "file:///etc/hostname", "~/x.txt"):
        spoil = write("texts/README.md", card.replace("{name}", name))
        yield bad(f"whose card names {name}", "README.md names", spoil)
    yield bad(
        "whose card has a tag",
        "README.md cannot",
        write("texts/README.md", "---\na: !!python/name:os\n---\n"),
    )
    state = write("texts/state.json", '{"_data_files": [{"filename": "../secret"}]}')
    yield bad("whose state names ../secret", "state.json names", state)
    splits = write("texts/dataset_dict.json", '{"splits": ["../secret"]}')
    yield bad("whose list names ../secret", "dataset_dict.json names", splits)


def _recipes() -> Iterator[HostileCase]:
    given = ("--recipe", "{home}/r.yaml")

    def bad(name: str, error_id: str, says: str, text: str) -> HostileCase:
        return run_case(f"recipe {name}", error_id, 2, says, write("r.yaml", text), *given)

    yield bad("of a billion values", "E-RECIPE-SYNTAX", "values", f"{BOMB}seed: *x8\n")
    yield bad("that holds itself", "E-RECIPE-SYNTAX", "alias", "pruning: &a {x: *a}\n")
    yield bad("with a key twice", "E-RECIPE-SYNTAX", "twice", "seed: 1\nseed: 2\n")
    section = "recovery: {epochs: 3}\nrecovery: {lr: 0.1}\n"
    yield bad("with a section twice", "E-RECIPE-SYNTAX", "'recovery' stands twice", section)
    yield bad("of two documents", "E-RECIPE-SYNTAX", "r.yaml", "seed: 1\n---\nseed: 2\n")
    yield bad("of a name of Python", "E-RECIPE-SYNTAX", "tags", "seed: !!python/name:os.system\n")
    yield bad("of an object of Python", "E-RECIPE-SYNTAX", "tags", "!!python/object:os.stat_result {}\n")
    yield bad("that includes a file", "E-RECIPE-SYNTAX", "tags", "seed: !include /etc/passwd\n")
    yield bad("with a list as key", "E-RECIPE-SYNTAX", "r.yaml", "? [1, 2]\n: 3\n")
    yield bad("with a number as key", "E-RECIPE-VALUE", "5: ", "5: 3\n")
    yield bad("with bytes as value", "E-RECIPE-VALUE", "seed", "seed: !!binary aGVsbG8=\n")
    yield bad("of a megabyte", "E-RECIPE-SYNTAX", "larger", f"# {'x' * 2**20}\nseed: 1\n")
    yield bad("with a long value", "E-RECIPE-VALUE", "...", f"seed: {'x' * 5000}\n")
    yield run_case("recipe a pipe", "E-RECIPE-NOT-FOUND", 2, "r.yaml", pipe("r.yaml"), *given)
    yield run_case("recipe a device", "E-RECIPE-NOT-FOUND", 2, "/dev/zero", nothing, "--recipe", "/dev/zero")
    loop = ("--set", "pruning.ignore=&a [*a]")
    yield run_case("setting that holds itself", "E-SET-SYNTAX", 2, "pruning.ignore", nothing, *loop)


INPUTS = (
    *_safetensors(),
    *_indexes(),
    *_configs(),
    *_tokenizers(),
    *_strays(),
    *_texts(),
    *_dataset_folders(),
    *_recipes(),
)
