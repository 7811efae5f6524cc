"""A folder with one safetensors file, or several and an index: read a tensor at a time, written a
file at a time."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark_megatron.bounded_text import read_json
from dspark_megatron.config.rules import shown
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.writing import whole_file, write_json

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of types."""


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file to read from. ConfigError when it is missing or damaged, or when what is
    asked of it is not there."""
    require(
        path.is_file() or not path.exists(),
        f"{path} must be a safetensors file, and is a folder, pipe or device; copy it again",
    )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} must be there as a whole, readable safetensors file ({error}); copy it again"
        ) from error


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """One safetensors file, whole or not at all."""
    with whole_file(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def parse_size(size: int | str) -> int:
    """Bytes of `5GB` (decimal), `5GiB` (binary) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", str(size).strip().upper())
    if match is None or not 0 < float(match[1]) < 1e15:
        raise ConfigError(
            f"max_shard_size ({shown(size)}) must be a positive size such as 5GB or 500MB"
        )
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def plan_files(tensors: dict[str, Tensor], max_shard_size: int | str) -> StateDictSplit:
    """Which file each tensor goes into, in the order of `tensors`, which may have no data (meta).
    A file has at most max_shard_size bytes, but for a single larger tensor."""
    return split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size),
    )


def write_tensor_files(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], plan: StateDictSplit
) -> None:
    """Write a stream of tensors as planned. A file is in memory until its last tensor has come."""
    needed, free = plan.metadata["total_size"], shutil.disk_usage(folder).free
    require(
        needed <= free,
        f"writing to {folder} takes {needed:,} bytes, its disk has {free:,} free; "
        "free some or choose another folder",
    )
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in plan.filename_to_tensors}
    for name, tensor in tensors:
        file = plan.tensor_to_filename[name]
        waiting[file][name] = tensor.contiguous()
        del tensor
        if len(waiting[file]) == len(plan.filename_to_tensors[file]):
            write_tensors(folder / file, waiting.pop(file), {"format": "pt"})
    if waiting:
        raise ValueError(f"the tensors ended before {', '.join(waiting)} had all of theirs")
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)


class SafetensorsFolder:
    """Reads the index once; files are opened when something is asked of them."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.files = _files_of(self.path)
        """File of every tensor."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, as its file has it."""
        return {name: shape for name, (shape, _) in self._headers.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of every tensor, as its file has it."""
        unknown = {name: kind for name, (_, kind) in self._headers.items() if kind not in DTYPES}
        require(
            not unknown,
            f"{self.path} has tensors of types that are not known here ({unknown}); "
            f"save it as one of {', '.join(DTYPES)}",
        )
        return {name: DTYPES[kind] for name, (_, kind) in self._headers.items()}

    def tensor(self, name: str) -> Tensor:
        """One whole tensor."""
        with open_safetensors(self._file_of(name)) as file:
            return file.get_tensor(name)

    def block(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Rows of a tensor, of a matrix also only some columns, and nothing else of it."""
        with open_safetensors(self._file_of(name)) as file:
            tensor = file.get_slice(name)
            return tensor[rows, columns] if len(tensor.get_shape()) > 1 else tensor[rows]

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of a matrix, and nothing else of it; rows past its end are zero (the
        padding of a vocabulary)."""
        with open_safetensors(self._file_of(name)) as file:
            matrix = file.get_slice(name)
            total, width = matrix.get_shape()
            found = matrix[min(start, total) : min(end, total)]
        return torch.cat([found, found.new_zeros(end - start - len(found), width)])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; no other file is opened."""
        with open_safetensors(self._file_of(name)) as file:
            return tuple(file.get_slice(name).get_shape())

    def part(self, name: str, dim: int | None, index: int, count: int) -> Tensor:
        """The index-th of `count` equal parts of a tensor along dim (0 or 1), and nothing else of
        it; dim None: all of it."""
        if dim is None:
            return self.tensor(name)
        size = self.shape(name)[dim] // count
        mine, whole = slice(index * size, (index + 1) * size), slice(None)
        return self.block(name, *((mine, whole) if dim == 0 else (whole, mine)))

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        headers = {}
        for path in sorted(set(self.files.values())):
            with open_safetensors(path) as file:
                for name in file.keys():
                    entry = file.get_slice(name)
                    headers[name] = (tuple(entry.get_shape()), entry.get_dtype())
        return headers

    def _file_of(self, name: str) -> Path:
        require(name in self.files, f"{self.path} has no tensor {name}")
        return self.files[name]


def has_safetensors(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (INDEX, "model.safetensors"))


def _files_of(folder: Path) -> dict[str, Path]:
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        return {name: folder / file for name, file in _weight_map(index).items()}
    require(
        single.is_file(),
        f"{folder} holds neither {single.name} nor {index.name}; save the model with "
        "Transformers' save_pretrained",
    )
    with open_safetensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def _weight_map(index: Path) -> dict[str, str]:
    entries: Any = read_json(index).get("weight_map")
    require(
        isinstance(entries, dict)
        and bool(entries)
        and all(isinstance(file, str) and Path(file).name == file for file in entries.values()),
        f"{index} must have a weight_map from tensors to files beside it; copy it again",
    )
    return entries
