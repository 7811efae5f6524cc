"""What is read straight from the target's folder: its config, single tensors, its fingerprint."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from dspark_megatron.config import ConfigError, require
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder, open_safetensors

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight",)


def load_target_config(target_dir: str | Path) -> PretrainedConfig:
    """The target's `config.json`; only a folder will do, never a hub name."""
    require(
        (Path(target_dir) / "config.json").is_file(),
        f"the target's folder {target_dir} must hold a config.json",
    )
    try:
        return AutoConfig.from_pretrained(target_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Transformers cannot read {target_dir}/config.json: {error}") from error


def stop_token_ids(target_dir: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer, ascending: those of the target's generation config (or its
    config) and the tokenizer's eos. A chat model's end of turn is often known only to the former,
    while its tokenizer names the end of a document."""
    if (Path(target_dir) / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(target_dir, local_files_only=True).eos_token_id
    else:
        own = load_target_config(target_dir).get_text_config().eos_token_id
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
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
    names = list(tensor_files(target_dir))
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


def read_tensor(folder: str | Path, name: str) -> Tensor:
    """One whole tensor of a safetensors folder."""
    return SafetensorsFolder(folder).tensor(name)


def read_rows(folder: str | Path, name: str, start: int, end: int) -> Tensor:
    """Rows [start, end) of a matrix, and nothing else of it; rows past its end are zero (the
    padding of a vocabulary)."""
    return SafetensorsFolder(folder).rows(name, start, end)


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """The file of every tensor of a folder with one safetensors file, or several and an index."""
    return SafetensorsFolder(folder).files


def tensor_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a safetensors folder, as its files have them."""
    return SafetensorsFolder(folder).shapes


def target_fingerprint(folder: str | Path) -> str:
    """Hex digest of every tensor's name, shape, type and first row: cheap at any size, and
    different for another model, another type or another fine-tune of the same model."""
    files = tensor_files(folder)
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
    for prefix in ("", "model.", "transformer."):
        exact = [name for name in names if name in [prefix + ending for ending in endings]]
        if exact:
            return exact
    return [name for name in names if name.endswith(tuple("." + ending for ending in endings))]
