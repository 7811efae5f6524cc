"""A stream of tensors as safetensors: one file, or shards with an index; one tensor in memory.

The safetensors library writes a file only from tensors that are all in memory, so its format (the
header's length, a JSON header, the tensors' bytes) is written here.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.safetensors_folder import DTYPES

INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Write = Callable[[bytes | memoryview], None]


@dataclass(frozen=True)
class TensorSpec:
    """What the header says of a tensor, known before the tensor is."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    specs: dict[str, TensorSpec],
    max_shard_size: int,
) -> None:
    """Write a stream of tensors as one file, or as shards of at most max_shard_size bytes (more
    only for a single larger tensor) with an index.

    specs: every tensor, in the order they will come, which is their order in the file. (Where types
    are mixed, wide ones first keep all aligned.) ValueError when they come otherwise. ConfigError
    when the disk has no room or refuses to write; what is written by then is left there.
    """
    files = plan_files(specs, max_shard_size)
    _check_space(folder, sum(spec.nbytes for spec in specs.values()))
    stream = iter(tensors)
    for file_name, part in files.items():
        with _new_file(folder / file_name) as write:
            write(_header(part))
            for name, spec in part.items():
                _write_next(write, stream, name, spec)
    for name, _ in stream:
        raise ValueError(f"tensor {name} came after the last one that was to come")
    if len(files) > 1:
        with _new_file(folder / INDEX) as write:
            write(_index(files))


def parse_size(size: int | str) -> int:
    """Bytes of `5GB` (decimal), `5GiB` (binary) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", str(size).strip().upper())
    require(
        match is not None and float(match[1]) > 0,
        f"max_shard_size ({size!r}) must be a positive size such as 5GB or 500MB",
    )
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def plan_files(
    specs: dict[str, TensorSpec], max_shard_size: int
) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of every file."""
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in specs.items():
        if used and used + spec.nbytes > max_shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(shards, 1)}


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    require(
        needed <= free,
        f"writing to {folder} takes {needed:,} bytes, its disk has {free:,} free; "
        "free some or choose another folder",
    )


@contextmanager
def _new_file(path: Path) -> Iterator[Write]:
    """A function that writes to a new file. Only the file's own errors become ConfigErrors: those
    of whoever makes the tensors are not about this disk."""
    with _refusal_of(path):
        file = path.open("wb")

    def write(data: bytes | memoryview) -> None:
        with _refusal_of(path):
            file.write(data)

    try:
        yield write
    finally:
        with _refusal_of(path):  # a network file system may say only now that it is full
            file.close()


@contextmanager
def _refusal_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; make room there or choose another folder"
        ) from error


def _header(specs: dict[str, TensorSpec]) -> bytes:
    """The header and its length before it; spaces at its end keep what follows aligned."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in specs.items():
        if spec.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name}: {spec.dtype} must be one of {list(_DTYPE_NAMES)}")
        end = start + spec.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_next(
    write: Write, stream: Iterator[tuple[str, Tensor]], name: str, spec: TensorSpec
) -> None:
    """A function of its own, so that the tensor is gone before the next one is made."""
    found, tensor = next(stream, (None, None))
    if tensor is None:
        raise ValueError(f"the tensors ended before {name} came")
    if found != name:
        raise ValueError(f"tensor {found} came where {name} was to come")
    if TensorSpec(tuple(tensor.shape), tensor.dtype) != spec:
        raise ValueError(
            f"{name} must be {spec.dtype} of shape {list(spec.shape)}, "
            f"is {tensor.dtype} of shape {list(tensor.shape)}"
        )
    # NumPy lacks bfloat16, so as bytes; no copy of a contiguous tensor.
    write(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))


def _index(files: dict[str, dict[str, TensorSpec]]) -> bytes:
    file_of = {name: file_name for file_name, part in files.items() for name in part}
    total = sum(spec.nbytes for part in files.values() for spec in part.values())
    weight_map = {name: file_of[name] for name in sorted(file_of)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()
