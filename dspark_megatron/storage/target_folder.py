"""What is read straight from the target's folder: its config, single tensors, its fingerprint."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dspark_megatron.bounded_text import read_json
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder, open_safetensors
from dspark_megatron.storage.target_schema import check_schema

EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embeddings.weight"),
    "embed_in.weight",
)
HEADS = ("lm_head.weight", "embed_out.weight")
READ = (".json", ".jinja", ".model", ".safetensors")
"""Ends of the names of files that are read."""


def load_target_config(target_dir: str | Path) -> PretrainedConfig:
    """The target's `config.json`; only a folder will do, never a hub name, and only of a class that
    Transformers has itself: code of the folder is never run."""
    folder = Path(target_dir)
    file = folder / "config.json"
    require(os.path.lexists(file), f"the target's folder {target_dir} must hold a config.json")
    _check_plain(folder)
    own = read_json(file)
    check_schema(own, file)
    _check_class(file, own)
    names: dict[str, str] = CONFIG_MAPPING[own["model_type"]].attribute_map
    check_schema({usual: own[name] for usual, name in names.items() if name in own}, file)
    try:
        config = AutoConfig.from_pretrained(
            target_dir, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each family's class checks its keys in its own way
        raise ConfigError(f"Transformers cannot read {file}: {_one_line(error)}") from error
    config._attn_implementation = None  # it may name code of the hub
    return config


def load_tokenizer(target_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a target's folder; code of the folder is never run."""
    _check_plain(Path(target_dir))
    settings = list(map(read_json, Path(target_dir).glob("tokenizer_config.json")))
    try:
        return AutoTokenizer.from_pretrained(
            target_dir, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a damaged file raises whatever its reader does
        own = next((found["auto_map"] for found in settings if found.get("auto_map")), None)
        reason = _one_line(error)
        if own:
            reason = (
                f"its tokenizer_config.json names code of the folder ({own}), which is never run; "
                "save the tokenizer once in Transformers' own form, with a tokenizer.json and "
                "without auto_map"
            )
        message = f"target.path {target_dir} must hold the target's tokenizer: {reason}"
        raise ConfigError(message) from error


def _check_plain(folder: Path) -> None:
    """ConfigError for a folder with a pipe or device in it, whose reader would wait for ever, and
    for what has the name of a file that is read and is none: Transformers would pass it over."""
    try:
        strange = [
            file.name
            for file in folder.iterdir()
            if not file.is_file() and (file.suffix in READ or (file.exists() and not file.is_dir()))
        ]
    except OSError as error:
        raise ConfigError(f"cannot read the target's folder {folder}: {error.strerror}") from error
    require(
        not strange,
        f"{', '.join(map(repr, sorted(strange)))} in the target's folder {folder} must be a file, "
        "and is a folder, pipe or device, or a link that leads nowhere; copy it again or take it "
        "out",
    )


def _check_class(file: Path, config: dict[str, Any]) -> None:
    """ConfigError unless Transformers itself has the class of a `config.json`."""
    family, names = config.get("model_type"), config.get("architectures") or []
    if family in CONFIG_MAPPING:
        return
    code = ", only code in the folder (auto_map), which is never run" * bool(config.get("auto_map"))
    public = [kind for kind, own in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if own in names]
    way_out = "take a newer Transformers, or a target of a family that it has"
    if public:
        way_out = (
            f"but {names[0]} is also Transformers' own class of {public[0]!r}: make a copy of the "
            f"folder (links will do) whose config.json says model_type {public[0]!r} and has no "
            "auto_map; the check of logits at start tells whether they are the same"
        )
    raise ConfigError(
        f"{file} is of model_type {family!r}, for which Transformers {transformers.__version__} "
        f"has no class{code}; {way_out}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def stop_token_ids(target_dir: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer, ascending: those of the target's generation config (or its
    config) and the tokenizer's eos. A chat model's end of turn is often known only to the former,
    while its tokenizer names the end of a document."""
    file = Path(target_dir) / "generation_config.json"
    if file.is_file():
        generation = read_json(file)
        check_schema({"eos_token_id": generation.get("eos_token_id")}, file)
        own = generation.get("eos_token_id")
    else:
        own = load_target_config(target_dir).get_text_config().eos_token_id
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    stops = {token for token in found if token is not None and token >= 0}
    require(
        bool(stops),
        f"the target {target_dir} must name a token that ends an answer; set eos_token_id in its "
        "generation_config.json",
    )
    return sorted(stops)


def shared_weights(target_dir: str | Path) -> tuple[str, str]:
    """Names of the token embedding and the LM head; the same name twice when they are tied.

    As Transformers does, a head that is in the folder counts even if the config ties it.
    """
    names = list(SafetensorsFolder(target_dir).files)
    embedding = _pick(names, EMBEDDINGS)
    require(
        len(embedding) == 1,
        f"{target_dir} must hold exactly one token embedding (*{' or *'.join(EMBEDDINGS)}), "
        f"found {embedding or 'none'}",
    )
    heads = _pick(names, HEADS)
    require(len(heads) <= 1, f"{target_dir} must hold one LM head, found {heads}")
    if not heads:
        config = load_target_config(target_dir)
        both = (config, config.get_text_config())
        require(
            any(getattr(part, "tie_word_embeddings", False) for part in both),
            f"{target_dir} holds no lm_head.weight and its config does not tie it to the "
            "embedding; use the folder of a causal language model",
        )
    return embedding[0], (heads or embedding)[0]


def target_fingerprint(folder: str | Path) -> str:
    """Hex digest of every tensor's name, shape, type and first row: cheap at any size, and
    different for another model, another type or another fine-tune of the same model."""
    files = SafetensorsFolder(folder).files
    digest = hashlib.sha256()
    for name in sorted(files):
        with open_safetensors(files[name]) as file:
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            first = tensor[:1] if shape else file.get_tensor(name)
            digest.update(f"{name}{shape}{tensor.get_dtype()}".encode())
            digest.update(first.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pick(names: list[str], endings: tuple[str, ...]) -> list[str]:
    """Names with such an ending. The main model's own comes before those of its parts (a layer for
    multi-token prediction may carry a copy)."""
    for prefix in ("", "model.", "transformer.", "backbone."):
        exact = [name for name in names if name in [prefix + ending for ending in endings]]
        if exact:
            return exact
    return [name for name in names if name.endswith(tuple("." + ending for ending in endings))]
