"""Opening model folders: what is read from them, and what is refused before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import change_json, make_tokenizer, write_checkpoint

from compressor.errors import HubError, InputRefused, ReportedError
from compressor.models.checkpoint import open_checkpoint
from compressor.models.weight_files import read_header

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama with a tokenizer."""
    return write_checkpoint(tmp_path / "tiny")


def refusal(path: Path | str, **options: Any) -> ReportedError:
    """The error that opening ``path`` ends with."""
    with pytest.raises(ReportedError) as refused:
        open_checkpoint(path, **options)
    return refused.value


def rewrite_header(path: Path, header: str) -> None:
    """Put another header before the tensors of a safetensors file."""
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + tensors)


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file."""
    content = path.read_bytes()
    found: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found


def test_checkpoint_tells_what_it_is(folder: Path) -> None:
    """Name, type, dtype and size of a folder are known without loading it; the path to it is not in its name."""
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.name, checkpoint.revision) == ("tiny", None)
    assert checkpoint.architecture.model_type == "llama"
    assert checkpoint.dtype == torch.float32
    assert checkpoint.source_bytes == (folder / WEIGHTS).stat().st_size
    assert checkpoint.notices == ()


def test_checkpoint_dtype_falls_back_to_the_tensors(folder: Path) -> None:
    """Without a dtype in the config, the one that most weights have counts."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    change_json(folder / "config.json", dtype=None)
    assert open_checkpoint(folder).dtype == torch.bfloat16


def test_checkpoint_identity_follows_the_content(folder: Path) -> None:
    """The digest is the same when opened twice, and another as soon as one weight is."""
    before = open_checkpoint(folder).identity
    assert open_checkpoint(folder).identity == before
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert open_checkpoint(folder).identity != before


def test_checkpoint_joins_documents_with_the_config_token(folder: Path) -> None:
    """Where tokenizer and config differ about the end of a text, the config's token counts."""
    assert open_checkpoint(folder).load_tokenizer().eos_token_id == 2
    change_json(folder / "config.json", eos_token_id=[1, 2])
    assert open_checkpoint(folder).load_tokenizer().eos_token_id == 2
    change_json(folder / "config.json", eos_token_id=1)
    assert open_checkpoint(folder).load_tokenizer().eos_token_id == 1


def test_checkpoint_needs_a_tokenizer_only_when_asked(folder: Path) -> None:
    """A folder without a tokenizer opens; asking for the tokenizer is refused."""
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputRefused) as refused:
        open_checkpoint(folder).load_tokenizer()
    assert refused.value.error_id == "E-TOKENIZER-NOT-FOUND"


def test_checkpoint_only_warns_of_config_ids(folder: Path) -> None:
    """Token ids in configs beyond the embedding are told, not refused."""
    change_json(folder / "config.json", pad_token_id=104)
    change_json(folder / "generation_config.json", eos_token_id=[2, 900])
    notices = open_checkpoint(folder).notices
    assert [note for note in notices if "pad_token_id 104" in note]
    assert [note for note in notices if "eos_token_id 900" in note]


def test_checkpoint_does_not_run_code_it_does_not_need(folder: Path) -> None:
    """A supported type that brings code of its own opens with transformers' implementation, and says so."""
    change_json(
        folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )
    (folder / "evil.py").write_text("raise SystemExit('this code was run')", encoding="utf-8")
    for trust in (False, True):
        checkpoint = open_checkpoint(folder, trust_remote_code=trust)
        assert "auto_map" in checkpoint.notices[0]


@pytest.mark.parametrize("missing", ["nowhere/at/all", "./nowhere", "/nowhere"])
def test_checkpoint_refuses_a_missing_folder(missing: str) -> None:
    """What looks like a path and is none is not asked for on the hub."""
    assert refusal(missing).error_id == "E-MODEL-NOT-FOUND"


def test_checkpoint_refuses_what_is_no_model_folder(tmp_path: Path, folder: Path) -> None:
    """A file, an empty folder and a folder without weights are no models; each says what it lacks."""
    assert "is a file" in refusal(folder / WEIGHTS).message
    assert "config.json" in refusal(tmp_path).message
    (folder / WEIGHTS).unlink()
    error = refusal(folder)
    assert error.error_id == "E-MODEL-NOT-FOUND"
    assert WEIGHTS in error.message


def test_checkpoint_refuses_pickles_and_says_how_to_convert(folder: Path) -> None:
    """Weights that exist as a pickle only are refused."""
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    error = refusal(folder)
    assert (error.error_id, error.exit_code) == ("E-MODEL-PICKLE", 3)
    assert "save_pretrained" in error.remedy


def test_checkpoint_refuses_adapters(folder: Path) -> None:
    """An adapter is no model, and the way to merge it is named."""
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert refusal(folder).error_id == "E-MODEL-ADAPTER"


def test_checkpoint_refuses_other_kinds_by_name(folder: Path) -> None:
    """An unsupported model is refused with its type, its task and the list of supported types."""
    change_json(folder / "config.json", model_type="bert", architectures=["BertForMaskedLM"])
    error = refusal(folder)
    assert error.error_id == "E-MODEL-UNSUPPORTED"
    assert "bert" in error.message
    assert "fill-mask" in error.message
    assert "qwen3_moe" in error.remedy


def test_checkpoint_names_the_library_of_another_folder(tmp_path: Path) -> None:
    """A diffusion pipeline is called one."""
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    assert "diffusers" in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("changes", "error_id"),
    [
        ({"_post_init_done": True}, "E-CONFIG-UNSAFE"),
        ({"_name_or_path": ["a"]}, "E-CONFIG-UNSAFE"),
        ({"rope_parameters": {"rope_type": "default", "_anything": 1}}, "E-CONFIG-UNSAFE"),
        ({"nested": [{"trust_remote_code": True}]}, "E-CONFIG-UNSAFE"),
        ({"attn_implementation": "somebody/kernel"}, "E-CONFIG-UNSAFE"),
        ({"_experts_implementation": "somebody/kernel:f"}, "E-CONFIG-UNSAFE"),
        ({"auto_map": "evil.Model"}, "E-CONFIG-UNSAFE"),
        ({"to_dict": 1}, "E-CONFIG-UNSAFE"),
        ({"vocab_size": 2**40}, "E-CONFIG-SIZE"),
        ({"vocab_size": 2**20}, "E-CONFIG-SIZE"),
        ({"num_hidden_layers": 1000}, "E-CONFIG-SIZE"),
        ({"num_hidden_layers": 0}, "E-CONFIG-SIZE"),
        ({"hidden_size": "32"}, "E-CONFIG-SIZE"),
        ({"num_labels": 10**9}, "E-CONFIG-SIZE"),
        ({"anything": {"deep": 10**30}}, "E-CONFIG-SIZE"),
        ({"rms_norm_eps": "small"}, "E-CONFIG-INVALID"),
        ({"quantization_config": {"quant_method": "awq"}}, "E-MODEL-QUANTIZED"),
    ],
)
def test_checkpoint_refuses_a_hostile_config(folder: Path, changes: dict[str, Any], error_id: str) -> None:
    """Keys that reach into the loader, code, absurd sizes and wrong fields are refused, and the field is named."""
    change_json(folder / "config.json", **changes)
    error = refusal(folder)
    assert (error.error_id, error.exit_code) == (error_id, 3)
    if error_id != "E-MODEL-QUANTIZED":
        assert any(key in error.message for key in (*changes, "deep", "_anything", "trust_remote_code"))


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 50 + "1" + "}" * 50]
)
def test_checkpoint_refuses_a_config_that_is_no_config(folder: Path, content: str) -> None:
    """What is no JSON object, names a key twice or nests without end is refused as such."""
    (folder / "config.json").write_text(content, encoding="utf-8")
    assert refusal(folder).error_id == "E-CONFIG-SYNTAX"


@pytest.mark.parametrize(("keep", "where"), [(4, "header"), (100, "header"), (-1, "tensors need")])
def test_checkpoint_refuses_truncated_weights(folder: Path, keep: int, where: str) -> None:
    """A file that ends in its header or in its tensors is refused, and it is said where it ends."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    error = refusal(folder)
    assert error.error_id == "E-WEIGHTS-TRUNCATED"
    assert where in error.message


def test_checkpoint_refuses_a_doubled_header_key(folder: Path) -> None:
    """A header that names a tensor twice is refused, since readers differ about which one counts."""
    header = json.dumps(header_of(folder / WEIGHTS))
    entry = json.dumps(header_of(folder / WEIGHTS)["lm_head.weight"])
    rewrite_header(folder / WEIGHTS, header[:-1] + f', "lm_head.weight": {entry}}}')
    assert refusal(folder).error_id == "E-WEIGHTS-DUPLICATE"


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F33"},
        {"shape": [-1, 32]},
        {"shape": [2**70, 2**70]},
        {"shape": [True, 3328]},
        {"data_offsets": [0, 10]},
        {"data_offsets": [8, 13320]},
        {"data_offsets": None},
    ],
)
def test_checkpoint_refuses_a_contradictory_header(folder: Path, changes: dict[str, Any]) -> None:
    """Unknown dtypes, impossible shapes, overlaps and holes are refused, and the tensor is named."""
    header = header_of(folder / WEIGHTS)
    name = min(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"])
    header[name].update(changes)
    rewrite_header(folder / WEIGHTS, json.dumps(header))
    error = refusal(folder)
    assert error.error_id == "E-WEIGHTS-HEADER"
    assert name in error.message or "begins at" in error.message


def test_checkpoint_refuses_trailing_bytes(folder: Path) -> None:
    """Bytes that belong to no tensor are refused."""
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    assert refusal(folder).error_id == "E-WEIGHTS-HEADER"


def test_checkpoint_refuses_quantised_tensors(folder: Path) -> None:
    """Weights in eight bits are refused even where the config says nothing of it."""
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    error = refusal(folder)
    assert error.error_id == "E-MODEL-QUANTIZED"
    assert name in error.message


def shard(folder: Path) -> dict[str, str]:
    """Split the weights in two shards with an index; returns the weight map."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    halves = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, part in halves.items() for name in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    """Write the index of the shards."""
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def test_checkpoint_reads_shards(folder: Path) -> None:
    """A sharded model has all its tensors, and a missing shard is refused by name."""
    names = shard(folder).keys()
    assert open_checkpoint(folder).weights.tensors.keys() == names
    (folder / "b.safetensors").unlink()
    error = refusal(folder)
    assert error.error_id == "E-WEIGHTS-SHARD-MISSING"
    assert "b.safetensors" in error.message


@pytest.mark.parametrize("place", ["../a.safetensors", "/etc/passwd", "x/../a.safetensors", "a.bin", 3, ".."])
def test_checkpoint_refuses_an_index_that_points_outside(folder: Path, place: Any) -> None:
    """An index may name safetensors files beside it and nothing else."""
    weight_map = shard(folder)
    write_index(folder, {**weight_map, "lm_head.weight": place})
    assert refusal(folder).error_id == "E-WEIGHTS-INDEX"


def test_checkpoint_refuses_an_index_that_promises_too_much(folder: Path) -> None:
    """A tensor that is not in the file that the index names is refused."""
    write_index(folder, {**shard(folder), "model.more.weight": "a.safetensors"})
    error = refusal(folder)
    assert error.error_id == "E-WEIGHTS-INDEX"
    assert "model.more.weight" in error.message


def test_checkpoint_copies_terms_and_tokenizer(folder: Path) -> None:
    """Licence, notice and tokenizer files travel with the model, the readme and stray files do not."""
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "README.md", "train.py", "chat_template.jinja"):
        (folder / name).write_text("x", encoding="utf-8")
    names = {path.name for path in open_checkpoint(folder).copied_files}
    assert names == {
        "LICENSE", "NOTICE.txt", "USE_POLICY.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_checkpoint_refuses_a_tokenizer_that_asks_for_code(folder: Path) -> None:
    """A tokenizer config cannot switch trust on."""
    make_tokenizer().save_pretrained(folder)
    change_json(folder / "tokenizer_config.json", trust_remote_code=True)
    with pytest.raises(InputRefused) as refused:
        open_checkpoint(folder).load_tokenizer()
    assert refused.value.error_id == "E-CONFIG-UNSAFE"


def test_hub_says_that_it_is_offline() -> None:
    """A model that is not cached is not fetched while the hub may not be asked."""
    error = refusal("somebody/no-such-model")
    assert isinstance(error, HubError)
    assert error.error_id == "E-HUB-OFFLINE"
    assert error.exit_code == 7


def test_hub_refuses_what_cannot_be_an_id() -> None:
    """A name that no hub model can have is neither folder nor model."""
    assert refusal("not a model!").error_id == "E-MODEL-NOT-FOUND"


def test_checkpoint_refuses_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight file without the right to read it is refused by name."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    # config.json is read through the same call first, so the header is asked for directly.
    with pytest.raises(InputRefused, match="Permission denied") as refused:
        read_header(folder / WEIGHTS)
    assert refused.value.error_id == "E-WEIGHTS-UNREADABLE"
