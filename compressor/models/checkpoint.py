"""A model folder or hub id, opened and checked before any weight is loaded."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.errors import InputRefused
from compressor.models.config_file import read_json_object, read_settings
from compressor.models.folder_files import is_plain_name, refuse_strays
from compressor.models.hub import fetch
from compressor.models.kind import describe_kind, library_of
from compressor.models.quiet import quiet_transformers
from compressor.models.registry import Architecture, architecture_of
from compressor.models.structure import ModelStructure, split_settings
from compressor.models.weight_files import WeightFiles, find_weight_files

__all__ = ["Checkpoint", "open_checkpoint", "open_tokenizer"]

# What belongs to the text side and the terms of a model, and is copied beside the sparse one byte by byte.
_TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json", "vocab.txt",
)  # fmt: skip
_LICENCE_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on the disk.

    Attributes:
        folder: Where its files are.
        name: The hub id, or the folder's own name without the path to it.
        revision: The hub's commit, ``None`` for a local folder.
        settings: The content of ``config.json``, without the structure.
        config: The same as an object of transformers.
        architecture: What is special about its type.
        dtype: What its weights are stored in: float32, float16 or bfloat16.
        weights: The weight files and what they hold.
        copied_files: Tokenizer, chat template and licence files.
        structure: Widths that differ from layer to layer, or ``None`` where the config says it all.
        trust_remote_code: Whether the user trusts the code in the folder.
        notices: What the user should know and that is no error.
    """

    folder: Path
    name: str
    revision: str | None
    settings: Mapping[str, Any]
    config: Any
    architecture: Architecture
    dtype: torch.dtype
    weights: WeightFiles
    copied_files: tuple[Path, ...]
    structure: ModelStructure | None = None
    trust_remote_code: bool = False
    notices: tuple[str, ...] = ()

    @property
    def source_bytes(self) -> int:
        """Bytes of the weight files together."""
        return self.weights.size_bytes

    @functools.cached_property
    def identity(self) -> str:
        """sha256 over the names and contents of config, weight, tokenizer and generation files (hex)."""
        digest = hashlib.sha256()
        others = [self.folder / "config.json", self.folder / "generation_config.json", *self.copied_files]
        for path in sorted({*others, *self.weights.paths}):
            if path.is_file():
                with path.open("rb") as stream:
                    content = hashlib.sha256()
                    for piece in iter(functools.partial(stream.read, 2**22), b""):
                        content.update(piece)
                digest.update(f"{path.name}\0{content.hexdigest()}\n".encode())
        return digest.hexdigest()

    def load_tokenizer(self) -> Any:
        """The tokenizer that comes with the model.

        Its end-of-text token is the one that the config names: the model was trained with that one, and where the
        tokenizer names another, documents joined with it are no text that the model knows.

        Raises:
            InputRefused: E-TOKENIZER-NOT-FOUND: there is none, or it cannot be read; E-CONFIG-UNSAFE.
        """
        return _load_tokenizer(self.folder, self.name, self.settings, self.trust_remote_code)


def open_checkpoint(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """The checkpoint that a path or hub id names, its files checked; its weights stay on the disk.

    Args:
        model: A path that exists is a local folder; anything else is a hub id, which is fetched if need be.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the model or its tokenizer. Models of the supported
            architectures run on transformers' own code in any case.

    Raises:
        InputRefused: E-MODEL-NOT-FOUND, E-MODEL-ADAPTER, E-MODEL-PICKLE, E-MODEL-UNSUPPORTED,
            E-MODEL-MULTIMODAL,
            E-MODEL-QUANTIZED, E-MODEL-REMOTE-CODE, E-CONFIG-SYNTAX, E-CONFIG-UNSAFE, E-CONFIG-SIZE,
            E-CONFIG-INVALID, E-STRUCTURE-INVALID, E-WEIGHTS-SHARD-MISSING, E-WEIGHTS-INDEX,
            E-WEIGHTS-TRUNCATED, E-WEIGHTS-HEADER, E-WEIGHTS-DUPLICATE, E-MODEL-FILE-ESCAPES.
        HubError: The hub does not have it, or cannot be reached.
    """
    folder, name, commit = _locate(model, revision, trust_remote_code)
    refuse_strays(folder)
    _refuse_other_folders(folder, name)
    settings, structure = split_settings(read_settings(folder / "config.json"))
    architecture = _architecture(folder, settings, trust_remote_code)
    weights = find_weight_files(folder, name)
    _refuse_quantised_tensors(weights)
    _refuse_sizes_beyond(weights, settings)
    config = _load_config(folder, settings, architecture, structure)
    return Checkpoint(
        folder=folder,
        name=name,
        revision=commit,
        settings=settings,
        config=config,
        architecture=architecture,
        dtype=_dtype(settings, weights),
        weights=weights,
        copied_files=tuple(_copied_files(folder, architecture)),
        structure=structure,
        trust_remote_code=trust_remote_code,
        notices=tuple(_notices(folder, settings, config, architecture)),
    )


def open_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Tokenizer and config of a model's folder that may be without weights, as an exported one is.

    Raises:
        InputRefused: E-MODEL-UNSUPPORTED, E-CONFIG-SYNTAX, E-CONFIG-UNSAFE, E-CONFIG-SIZE, E-CONFIG-INVALID,
            E-TOKENIZER-NOT-FOUND and the like, as ``open_checkpoint`` and ``Checkpoint.load_tokenizer`` say.
    """
    refuse_strays(folder)
    settings, structure = split_settings(read_settings(folder / "config.json"))
    config = _load_config(folder, settings, _architecture(folder, settings, trust_remote_code), structure)
    return _load_tokenizer(folder, folder.resolve().name, settings, trust_remote_code), config


def _locate(model: str | Path, revision: str | None, code: bool) -> tuple[Path, str, str | None]:
    """Folder, name and commit of a model."""
    if not str(model):
        raise InputRefused(
            "E-MODEL-NOT-FOUND", "the model's name is empty", "give the folder of a model, or a hub id"
        )
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return path, path.resolve().name, None
    if os.path.exists(path):
        raise InputRefused(
            "E-MODEL-NOT-FOUND",
            f"{model} is a file, not the folder of a model",
            "give the folder that it lies in",
        )
    if isinstance(model, Path) or model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise InputRefused(
            "E-MODEL-NOT-FOUND", f"there is no folder {model}", "give the folder of a model, or a hub id"
        )
    folder, commit = fetch(model, revision, code=code)
    return folder, model, commit


def _refuse_other_folders(folder: Path, name: str) -> None:
    if (folder / "adapter_config.json").is_file():
        raise InputRefused(
            "E-MODEL-ADAPTER",
            f"{name} is an adapter, or has one beside it (adapter_config.json), and no whole model",
            "merge it into its base model with PEFT's merge_and_unload and give the merged folder",
        )
    if not (folder / "config.json").is_file():
        kind = library_of(folder)
        raise InputRefused(
            "E-MODEL-NOT-FOUND",
            f"{name} has no config.json, so it is no model folder" + (f" but a {kind} one" if kind else ""),
            "give the folder that save_pretrained wrote, or a hub id",
        )


def _architecture(folder: Path, settings: Mapping[str, Any], trust_remote_code: bool) -> Architecture:
    try:
        return architecture_of(settings, trust_remote_code=trust_remote_code)
    except InputRefused as refusal:
        kind = describe_kind(folder, settings) if refusal.error_id == "E-MODEL-UNSUPPORTED" else None
        if kind is None:
            raise
        raise InputRefused(refusal.error_id, f"{refusal.message}; it is {kind}", refusal.remedy) from None


def _refuse_quantised_tensors(weights: WeightFiles) -> None:
    for name, tensor in weights.tensors.items():
        small_integer = tensor.dtype in ("I8", "U8") and name.endswith("weight")
        if tensor.dtype.startswith(("F8", "F6", "F4")) or small_integer:
            raise InputRefused(
                "E-MODEL-QUANTIZED",
                f"{name} is stored as {tensor.dtype}: the checkpoint is quantised",
                "start from the checkpoint in float32, float16 or bfloat16",
            )


def _refuse_sizes_beyond(weights: WeightFiles, settings: Mapping[str, Any]) -> None:
    """Refuse a config whose embedding or norms alone would be larger than all that is stored."""
    stored = sum(tensor.numel for tensor in weights.tensors.values())
    width = min(
        _size(settings, "hidden_size", "n_embd"), _size(settings, "word_embed_proj_dim", default=2**62)
    )
    depth = _size(settings, "num_hidden_layers", "n_layer")
    for what, needed in (
        ("vocab_size", _size(settings, "vocab_size") * width),
        ("num_hidden_layers", depth * width),
    ):
        if needed > stored:
            raise InputRefused(
                "E-CONFIG-SIZE",
                f"config.json: {what} asks for at least {needed} weights, the files hold {stored}",
                "fetch the model again: config.json and weights do not belong together",
            )


def _size(settings: Mapping[str, Any], *keys: str, default: int = 1) -> int:
    return next((value for key in keys if isinstance(value := settings.get(key), int)), default)


def _load_config(
    folder: Path, settings: Mapping[str, Any], architecture: Architecture, structure: ModelStructure | None
) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    for key in settings:
        # Each key becomes an attribute of the config object; one of a method's name would replace the method.
        if callable(getattr(PreTrainedConfig, key, None)):
            raise InputRefused(
                "E-CONFIG-UNSAFE",
                f"config.json: {key} would replace a method of the loader",
                "take the key out of the file, or use another checkpoint",
            )
    try:
        with quiet_transformers():
            if structure is not None:  # the file's model_type is none of transformers'
                return CONFIG_MAPPING[architecture.model_type].from_dict(dict(settings))
            return AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=architecture.remote_code
            )
    except Exception as error:  # each config class raises its own kind for a wrong field
        lines = " ".join(str(error).split())[:200]
        raise InputRefused(
            "E-CONFIG-INVALID",
            f"config.json is not a valid {architecture.label} config: {lines}",
            "fetch it again",
        ) from None


def _dtype(settings: Mapping[str, Any], weights: WeightFiles) -> torch.dtype:
    """What the config says the weights are, or what most of them are; float32 for anything else."""
    named = settings.get("dtype") or settings.get("torch_dtype")
    for dtype in _DTYPES.values():
        if named == str(dtype).removeprefix("torch."):
            return dtype
    counts: Counter[str] = Counter()
    for tensor in weights.tensors.values():
        counts[tensor.dtype] += tensor.numel
    most = [dtype for dtype, _ in counts.most_common() if dtype in _DTYPES]
    return _DTYPES[most[0]] if most else torch.float32


def _copied_files(folder: Path, architecture: Architecture) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        licence = path.name.upper().startswith(_LICENCE_PREFIXES)
        code = architecture.remote_code and path.suffix == ".py"
        if path.is_file() and (path.name in _TOKENIZER_FILES or licence or code):
            yield path


def _notices(
    folder: Path, settings: Mapping[str, Any], config: Any, architecture: Architecture
) -> Iterator[str]:
    if settings.get("auto_map") and not architecture.remote_code:
        yield "config.json names code of its own (auto_map); it is not run, transformers' is used"
    generation = folder / "generation_config.json"
    files: dict[str, Mapping[str, Any]] = {"config.json": settings}
    if generation.is_file():
        files[generation.name] = read_json_object(generation)
    for name, content in files.items():
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = content.get(key)
            for token in ids if isinstance(ids, list) else [ids]:
                if isinstance(token, int) and not 0 <= token < config.vocab_size:
                    yield f"{name}: {key} {token} is beyond the {config.vocab_size} rows of the embedding"


def _load_tokenizer(folder: Path, name: str, settings: Mapping[str, Any], trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    _refuse_unsafe_tokenizer(folder)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            _with_end_of_text(tokenizer, settings.get("eos_token_id"))("a", verbose=False)
            return tokenizer
    except BaseException as error:  # a damaged tokenizer raises whatever its parser raises
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
            raise
        raise InputRefused(
            "E-TOKENIZER-NOT-FOUND",
            f"{name} has no tokenizer that can be read: {first_line(error)}",
            "add tokenizer.json and tokenizer_config.json to the model's folder",
        ) from None


def _with_end_of_text(tokenizer: Any, eos: Any) -> Any:
    named = [token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)]
    if named and tokenizer.eos_token_id not in named and 0 <= named[0] < len(tokenizer):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(named[0])
    return tokenizer


def _refuse_unsafe_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = read_json_object(path) if path.is_file() else {}
    if settings.get("trust_remote_code"):
        raise _unsafe_tokenizer(path, "trust_remote_code asks to run code")
    for key, value in settings.items():
        names = value if isinstance(value, list) else [value]
        if _names_files(key) and value is not None and not all(map(is_plain_name, names)):
            raise _unsafe_tokenizer(path, f"{key} names {str(value)[:80]!r}, which is no file beside it")


def _names_files(key: str) -> bool:
    """Whether versions of transformers open what stands behind ``key`` of tokenizer_config.json.

    Behind ``special_tokens_map_file`` many checkpoints have a path of the machine that they were made on; it is read by
    none of them.
    """
    return key.endswith(("_file", "_files", "_spm")) and key != "special_tokens_map_file"


def _unsafe_tokenizer(path: Path, what: str) -> InputRefused:
    return InputRefused("E-CONFIG-UNSAFE", f"{path.name}: {what}", "take the key out of the file")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
