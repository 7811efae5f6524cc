"""Our own layout: what training can read of the states, in safetensors files.

    manifest.json            facts of target, data and rules; written last
    index.safetensors        keys and counts of all samples, the first sample of each shard
    shard_00000.safetensors  taps [c, m*h], last_hidden [u, h] and their positions [u], sample
                             after sample; with fp8 taps their scales [c, m]

Shapes: n samples, k shards; s, c, u, m, h as in `layout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.data.blocks import anchor_candidates, supervised_slots
from dspark_megatron.data.conversation import Sample
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.safetensors_folder import open_safetensors, write_tensors
from dspark_megatron.targets.stored.layout import (
    MAPPED_SHARDS,
    KeptStates,
    sample_key,
)

FORMAT = "dspark-megatron target cache 1"
FLOAT8 = torch.float8_e4m3fn
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": FLOAT8}
"""Of the taps. Last hidden states are bf16 beside fp8: they make the target's logits."""
_INDEX = "index.safetensors"


def context_size(loss_mask: Tensor, loss: LossConfig) -> int:
    """Positions that some block can see: those before the last candidate for an anchor. [s] -> c.
    At least one, as `DraftBlocks.context_positions` has."""
    return max([1, *anchor_candidates(loss_mask, loss)[-1:].tolist()])


def target_positions(loss_mask: Tensor, num_draft_tokens: int, loss: LossConfig) -> Tensor:
    """Positions whose last hidden state some supervised slot compares with. [s] -> ascending [u].
    Those of shorter blocks are among them."""
    anchors = anchor_candidates(loss_mask, loss)
    supervised = supervised_slots(loss_mask, anchors, num_draft_tokens, loss)
    return (anchors[:, None] + torch.arange(num_draft_tokens))[supervised].unique()


def to_float8(taps: Tensor, num_taps: int) -> tuple[Tensor, Tensor]:
    """[c, m*h] -> float8_e4m3fn [c, m*h] and the fp32 scale of each state of each layer, [c, m]:
    its largest number becomes the largest of the type."""
    states = taps.float().unflatten(-1, (num_taps, -1))  # [c, m, h]
    scale = states.abs().amax(dim=-1) / torch.finfo(FLOAT8).max
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    return (states / scale[..., None]).to(FLOAT8).flatten(1), scale


def from_float8(taps: Tensor, scale: Tensor) -> Tensor:
    """The inverse, in bf16: the type has half its digits."""
    states = taps.unflatten(-1, (scale.shape[-1], -1)).float() * scale[..., None]
    return states.bfloat16().flatten(1)


def shard_name(shard: int) -> str:
    return f"shard_{shard:05d}.safetensors"


class SampleEntry(NamedTuple):
    """A sample in the index."""

    key: bytes
    context: int
    targets: int
    """Last hidden states."""
    nbytes: int


@dataclass(frozen=True)
class SafetensorsLayout:
    """Writes the layout."""

    hidden_size: int
    num_taps: int
    dtype: str
    num_draft_tokens: int
    loss: LossConfig
    with_last_hidden: bool = True
    index: ClassVar[str] = _INDEX

    def entry(self, sample: Sample) -> SampleEntry:
        context = context_size(sample.loss_mask, self.loss)
        targets = len(self._positions(sample))
        taps = self.num_taps * (self.hidden_size * DTYPES[self.dtype].itemsize)
        if self.dtype == "float8":
            taps += self.num_taps * torch.float32.itemsize
        target = self.hidden_size * self._target_dtype.itemsize + torch.int32.itemsize
        return SampleEntry(sample_key(*sample), context, targets, context * taps + targets * target)

    def shard_name(self, shard: int) -> str:
        return shard_name(shard)

    def is_whole(self, path: Path, nbytes: int) -> bool:
        with path.open("rb") as file:  # safetensors: the length of the header in 8 bytes, it, data
            header = int.from_bytes(file.read(8), "little")
        return path.stat().st_size == 8 + header + nbytes

    def sample_tensors(
        self, sample: Sample, taps: Tensor, last_hidden: Tensor | None
    ) -> dict[str, Tensor]:
        taps = taps[: context_size(sample.loss_mask, self.loss)]
        if self.dtype == "float8":
            taps, scale = to_float8(taps, self.num_taps)
            tensors = {"taps": taps.cpu(), "taps_scale": scale.cpu()}
        else:
            tensors = {"taps": taps.to("cpu", DTYPES[self.dtype], copy=True)}
        if not self.with_last_hidden:
            return tensors
        assert last_hidden is not None
        positions = self._positions(sample)
        kept = last_hidden[positions.to(last_hidden.device)].to("cpu", self._target_dtype)
        return {**tensors, "last_hidden": kept, "positions": positions.int()}

    def write_shard(self, path: Path, samples: list[dict[str, Tensor]]) -> None:
        tensors = {name: torch.cat([one[name] for one in samples]) for name in samples[0]}
        write_tensors(path, tensors)

    def write_index(self, folder: Path, entries: list[SampleEntry], starts: list[int]) -> None:
        keys = torch.frombuffer(bytearray(b"".join(e.key for e in entries)), dtype=torch.uint8)
        index = {
            "keys": keys.view(len(entries), -1),
            "context": torch.tensor([entry.context for entry in entries]),
            "teachers": torch.tensor([entry.targets for entry in entries]),
            "shard_starts": torch.tensor(starts),
        }
        write_tensors(folder / _INDEX, index)

    def manifest(self, facts: dict[str, Any], starts: list[int]) -> dict[str, Any]:
        sizes = {"num_samples": starts[-1], "num_shards": len(starts) - 1}
        return {"format": FORMAT, "dtype": self.dtype, **sizes, **facts}

    @property
    def _target_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "float8" else DTYPES[self.dtype]

    def _positions(self, sample: Sample) -> Tensor:
        if not self.with_last_hidden:
            return torch.empty(0, dtype=torch.long)
        return target_positions(sample.loss_mask, self.num_draft_tokens, self.loss)


class SafetensorsStates:
    """Reads the layout by memory map."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.path, self.facts = folder, manifest
        index = _checked_index(folder / _INDEX)
        self._keys, self._starts = index["keys"], index["shard_starts"]
        shards = range(len(self._starts) - 1)
        absent = [i for i in shards if not (folder / shard_name(i)).is_file()]
        if absent:
            raise ConfigError(
                f"the stored states {folder} lack {len(absent)} of {len(shards)} shards, the "
                f"first is {shard_name(absent[0])}; the command that wrote them writes what is "
                "missing"
            )
        # States before each sample, counted through all shards.
        self._context = _before(index["context"])
        self._targets = _before(index["teachers"])
        self._shard = lru_cache(MAPPED_SHARDS)(self._open)

    def keys(self) -> list[bytes]:
        return [bytes(key) for key in self._keys.numpy()]

    def key(self, input_ids: Tensor, loss_mask: Tensor) -> bytes:
        return sample_key(input_ids, loss_mask)

    def states(self, place: int) -> KeptStates:
        shard = int(torch.searchsorted(self._starts, place, right=True)) - 1
        tensors, first = self._shard(shard), int(self._starts[shard])
        context = _range(self._context, place, first)
        taps = tensors["taps"][context]
        if "taps_scale" in tensors:
            taps = from_float8(taps, tensors["taps_scale"][context])
        if "last_hidden" not in tensors:
            return KeptStates(taps, None, torch.empty(0, dtype=torch.long))
        targets = _range(self._targets, place, first)
        positions = tensors["positions"][targets].long()
        return KeptStates(taps, tensors["last_hidden"][targets], positions)

    def shards(self) -> dict[str, Sequence[int]]:
        bounds = enumerate(pairwise(self._starts.tolist()))
        return {shard_name(shard): range(first, end) for shard, (first, end) in bounds}

    def _open(self, shard: int) -> dict[str, Tensor]:
        path = self.path / shard_name(shard)
        tensors = _tensors(path)
        require("taps" in tensors, f"{path} has no taps: it is no shard of states; copy it again")
        first, end = self._starts[shard : shard + 2].tolist()
        for name, before in (("taps", self._context), ("last_hidden", self._targets)):
            wanted, found = int(before[end] - before[first]), len(tensors.get(name, ()))
            require(
                wanted == found,
                f"{path} must hold {name} of {wanted} tokens and has {found}; it is of another "
                "folder: delete it and the manifest, and store the states again",
            )
        return tensors


def _checked_index(path: Path) -> dict[str, Tensor]:
    """Counts of every sample and the first one of each shard; ConfigError for anything else."""
    index = _tensors(path)
    lacking = {"keys", "context", "teachers", "shard_starts"} - index.keys()
    require(not lacking, f"{path} lacks {sorted(lacking)}: it is no index; copy it again")
    starts, sizes = index["shard_starts"].tolist(), {len(index[n]) for n in ("context", "teachers")}
    rises = all(a < b for a, b in pairwise(starts)) and starts[:1] == [0]
    require(
        rises and sizes == {len(index["keys"])} == {starts[-1]},
        f"{path} must count the same samples in keys, context, teachers and shard_starts; copy it "
        "again",
    )
    return index


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped: read when they are used."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _before(counts: Tensor) -> Tensor:
    """[n] -> [n + 1] sums of those before."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _range(before: Tensor, place: int, first: int) -> slice:
    """States of a sample in a shard whose first sample is `first`."""
    start, end = (before[place : place + 2] - before[first]).tolist()
    return slice(start, end)
