"""Tensors of a target's folder, read by slice from safetensors, and what identifies the target."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dspark_megatron.config import ConfigError


class TargetWeights:
    """The safetensors of one folder, single or indexed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file_of = self._index()

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def embedding_name(self) -> str:
        """Name of the token embedding."""
        return self._only(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))

    def head_name(self, tied: bool) -> str:
        """Name of the LM head: the embedding when the target ties the two."""
        return self.embedding_name() if tied else self._only(("lm_head.weight",))

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of a matrix; rows past its end are zero (vocabulary padding)."""
        with safe_open(self._file_of[name], framework="pt") as file:
            matrix = file.get_slice(name)
            total, width = matrix.get_shape()
            found = matrix[min(start, total) : min(end, total)]
        missing = end - start - found.shape[0]
        return torch.cat([found, found.new_zeros(missing, width)]) if missing else found

    def fingerprint(self) -> str:
        """Hex digest of every tensor's name, shape, type and first row: cheap at any size, and
        different for another model or another fine-tune of the same one."""
        digest = hashlib.sha256()
        for name in self.names():
            with safe_open(self._file_of[name], framework="pt") as file:
                tensor = file.get_slice(name)
                shape = tensor.get_shape()
                digest.update(f"{name}{shape}{tensor.get_dtype()}".encode())
                row = tensor[:1] if shape else file.get_tensor(name)
                digest.update(row.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _only(self, endings: tuple[str, ...]) -> str:
        found = [n for n in self._file_of if n in endings or n.endswith(tuple(f".{e}" for e in
                 endings))]
        if len(found) != 1:
            raise ConfigError(
                f"{self.path} must hold exactly one tensor named *{' or *'.join(endings)}, "
                f"found {found or 'none'}"
            )
        return found[0]

    def _index(self) -> dict[str, Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self.path / file for name, file in entries.items()}
        single = self.path / "model.safetensors"
        if not single.is_file():
            raise ConfigError(
                f"{self.path} must hold model.safetensors or model.safetensors.index.json; "
                "save the target with Transformers' save_pretrained"
            )
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
