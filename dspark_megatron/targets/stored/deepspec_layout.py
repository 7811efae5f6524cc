"""DeepSpec's target cache, version 2: all states of every token in bf16.

    manifest.json   what it holds, and the names of the shards
    samples.idx     56 bytes a sample: its id, shard and length, where its arrays begin
    *.bin           input_ids int32 [s], attention_mask uint8 [s], loss_mask uint8 [s],
                    target_hidden_states bf16 [s, m*h], target_last_hidden_states bf16 [s, h],
                    sample after sample

Shapes: s tokens of a sample, m target layers, h hidden size.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dspark_megatron.data.conversation import Sample
from dspark_megatron.errors import require
from dspark_megatron.storage.writing import whole_file, write_files
from dspark_megatron.targets.stored.layout import MAPPED_SHARDS, KeptStates, sample_key

VERSION = 2
RECORD = struct.Struct("<QIIQQQQQ")
_INDEX = "samples.idx"
_TYPES = {"hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8"}
_FACTS = "dspark_megatron"
"""Key of the manifest that only our own writer adds; DeepSpec does not look at it."""


class DeepSpecEntry(NamedTuple):
    """A sample in the index."""

    length: int
    nbytes: int


@dataclass(frozen=True)
class DeepSpecLayout:
    """Writes the layout."""

    hidden_size: int
    target_layer_ids: tuple[int, ...]
    target_path: str
    index: ClassVar[str] = _INDEX

    def entry(self, sample: Sample) -> DeepSpecEntry:
        length = len(sample.input_ids)
        return DeepSpecEntry(length, self.sample_bytes(length))

    def sample_bytes(self, length: int) -> int:
        """Of all that is kept of so many tokens."""
        return sum(self._sizes(length))

    def shard_name(self, shard: int) -> str:
        return f"shard-{shard:05d}.bin"

    def is_whole(self, path: Path, nbytes: int) -> bool:
        return path.stat().st_size == nbytes

    def sample_tensors(
        self, sample: Sample, taps: Tensor, last_hidden: Tensor | None
    ) -> dict[str, Tensor]:
        assert last_hidden is not None
        return {
            "input_ids": sample.input_ids.int(),
            "attention_mask": torch.ones(len(sample.input_ids), dtype=torch.uint8),
            "loss_mask": sample.loss_mask.to(torch.uint8),
            "target_hidden_states": taps.to("cpu", torch.bfloat16, copy=True),
            "target_last_hidden_states": last_hidden.to("cpu", torch.bfloat16, copy=True),
        }

    def write_shard(self, path: Path, samples: list[dict[str, Tensor]]) -> None:
        with whole_file(path) as partial, partial.open("wb") as file:
            for sample in samples:
                for tensor in sample.values():
                    file.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def write_index(self, folder: Path, entries: list[DeepSpecEntry], starts: list[int]) -> None:
        records = []
        for shard, (first, end) in enumerate(zip(starts, starts[1:], strict=False)):
            offset = 0
            for i in range(first, end):
                offsets = []
                for size in self._sizes(entries[i].length):
                    offsets.append(offset)
                    offset += size
                records.append(RECORD.pack(i, shard, entries[i].length, *offsets))
        write_files(folder, {_INDEX: b"".join(records)})

    def manifest(self, facts: dict[str, Any], starts: list[int]) -> dict[str, Any]:
        shards = range(len(starts) - 1)
        return {
            "version": VERSION,
            "num_samples": starts[-1],
            "num_shards": len(shards),
            "target_layer_ids": list(self.target_layer_ids),
            **_TYPES,
            "index_record_size": RECORD.size,
            "hidden_size": self.hidden_size,
            "shards": [{"shard_id": i, "file_name": self.shard_name(i)} for i in shards],
            "target_model_name_or_path": self.target_path,
            _FACTS: facts,
        }

    def _sizes(self, length: int) -> list[int]:
        """Bytes of the arrays of a sample, in their order."""
        state = length * self.hidden_size * torch.bfloat16.itemsize
        return [length * 4, length, length, len(self.target_layer_ids) * state, state]


class DeepSpecStates:
    """Reads the layout by memory map, whoever wrote it."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.path = folder
        _check(folder, manifest)
        self._hidden_size = manifest["hidden_size"]
        self._width = len(manifest["target_layer_ids"]) * self._hidden_size
        self._files = {s["shard_id"]: folder / s["file_name"] for s in manifest["shards"]}
        self.facts = {
            **manifest.get(_FACTS, {}),
            "target_layer_ids": manifest["target_layer_ids"],
            "hidden_size": self._hidden_size,
        }
        self._index = (folder / _INDEX).read_bytes()
        self._shard = lru_cache(MAPPED_SHARDS)(self._open)

    def keys(self) -> list[bytes]:
        """Reads the tokens of all samples."""
        return [sample_key(ids) for ids in self._input_ids()]

    def key(self, input_ids: Tensor, loss_mask: Tensor) -> bytes:
        """By the tokens alone: every state of them is there."""
        return sample_key(input_ids)

    def states(self, place: int) -> KeptStates:
        _, shard, length, *_, taps, last_hidden = self._record(place)
        return KeptStates(
            self._array(shard, taps, length, self._width),
            self._array(shard, last_hidden, length, self._hidden_size),
            torch.arange(length),
        )

    def shards(self) -> dict[str, Sequence[int]]:
        places: dict[str, list[int]] = {}
        for place in range(len(self._index) // RECORD.size):
            _, shard, *_ = self._record(place)
            self._check_known(shard)
            places.setdefault(self._files[shard].name, []).append(place)
        return {name: found for name, found in places.items()}

    def _input_ids(self) -> Iterator[Tensor]:
        for place in range(len(self._index) // RECORD.size):
            _, shard, length, start, *_ = self._record(place)
            # They need not begin at a multiple of their size, as a view of the file would.
            yield self._bytes(shard, start, 4 * length).clone().view(torch.int32)

    def _record(self, place: int) -> tuple[int, ...]:
        return RECORD.unpack_from(self._index, place * RECORD.size)

    def _array(self, shard: int, start: int, length: int, width: int) -> Tensor:
        """[length, width] of bf16 numbers of a mapped file."""
        found = self._bytes(shard, start, length * width * torch.bfloat16.itemsize)
        return found.view(torch.bfloat16).view(length, width)

    def _bytes(self, shard: int, start: int, nbytes: int) -> Tensor:
        self._check_known(shard)
        found = self._shard(shard)[start : start + nbytes]
        require(
            len(found) == nbytes,
            f"{self._files[shard]} ends before what {_INDEX} says of it; copy it again",
        )
        return found

    def _check_known(self, shard: int) -> None:
        require(
            shard in self._files, f"{_INDEX} of {self.path} names a shard {shard}; copy it again"
        )

    def _open(self, shard: int) -> Tensor:
        """The bytes of a shard, mapped."""
        path = self._files[shard]
        return torch.from_file(str(path), False, os.path.getsize(path), dtype=torch.uint8)


def _check(folder: Path, manifest: dict[str, Any]) -> None:
    names = {"num_samples", "target_layer_ids", "hidden_size", "index_record_size", "shards"}
    missing = sorted({*names, *_TYPES} - manifest.keys())
    require(
        not missing, f"the manifest of DeepSpec's cache {folder} lacks {missing}; copy it again"
    )
    for name, value in {"version": VERSION, **_TYPES, "index_record_size": RECORD.size}.items():
        require(
            manifest[name] == value,
            f"{name} of DeepSpec's cache {folder} must be {value!r} and is {manifest[name]!r}; "
            "write one of version 2 in bf16",
        )
    numbers = [manifest["hidden_size"], manifest["num_samples"], *_listed(manifest, folder)]
    require(
        all(type(number) is int for number in numbers) and min(numbers[:2]) > 0,
        f"hidden_size, num_samples and target_layer_ids in the manifest of DeepSpec's cache "
        f"{folder} must be whole numbers; copy it again",
    )
    require(
        isinstance(manifest["shards"], list) and all(map(_is_shard, manifest["shards"])),
        f"a shard in the manifest of DeepSpec's cache {folder} lacks its shard_id or file_name, "
        "the name of a file beside it; copy it again",
    )
    absent = [s["file_name"] for s in manifest["shards"] if not (folder / s["file_name"]).is_file()]
    require(not absent, f"the stored states {folder} lack the shards {absent[:5]}; copy them again")
    require((folder / _INDEX).is_file(), f"the stored states {folder} lack {_INDEX}; copy it")
    size, wanted = (folder / _INDEX).stat().st_size, manifest["num_samples"] * RECORD.size
    require(
        size == wanted,
        f"{folder / _INDEX} must have {wanted} bytes ({manifest['num_samples']} samples) and has "
        f"{size}; copy it again",
    )


def _listed(manifest: dict[str, Any], folder: Path) -> list[Any]:
    layers = manifest["target_layer_ids"]
    require(
        isinstance(layers, list) and bool(layers),
        f"target_layer_ids in the manifest of DeepSpec's cache {folder} must be a list; copy it "
        "again",
    )
    return layers


def _is_shard(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("shard_id")) is not int:
        return False
    name = entry.get("file_name")
    return isinstance(name, str) and Path(name).name == name
