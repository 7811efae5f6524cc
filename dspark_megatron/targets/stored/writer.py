"""Store the target's states: shard by shard, each whole or absent, so that a killed job goes on
where it was."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dspark_megatron.data.batch import Batch, padded
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.progress import Progress
from dspark_megatron.storage.checksums import checksum_of, keep_checksums
from dspark_megatron.storage.folder_lock import LOCK
from dspark_megatron.storage.writing import PARTIAL, claim_folder, write_json
from dspark_megatron.targets.base import Target
from dspark_megatron.targets.stored.layout import (
    MANIFEST,
    UNFINISHED,
    StatesLayout,
    differences,
    read_json,
)
from dspark_megatron.targets.stored.verification import (
    check_finite,
    checksum_file,
    known_checksums,
    read_checksum,
)


class StatesWriter:
    """A folder to be written. Which sample goes where is settled by the data alone, so any number
    of ranks may begin it and another go on; bytes differ between layouts of the target only by the
    rounding of its sums."""

    def __init__(
        self,
        layout: StatesLayout,
        data: ConversationDataset,
        output: Path,
        facts: dict[str, Any],
        *,
        shard_bytes: int,
    ) -> None:
        """facts: what a later reader, or a job that goes on, compares."""
        self.layout, self.data, self.output = layout, data, output
        self.entries = [layout.entry(data[i]) for i in range(len(data))]
        self.starts = _shard_starts([entry.nbytes for entry in self.entries], shard_bytes)
        facts = {**facts, "shard_bytes": shard_bytes}
        # As it is read again: without tuples.
        self.manifest = json.loads(json.dumps(layout.manifest(facts, self.starts)))

    @property
    def nbytes(self) -> int:
        """Of all shards."""
        return self._bytes_of(range(len(self.starts) - 1))

    def claim(self) -> list[int]:
        """The shards that are missing; on one rank, before the target is loaded. Prints what will
        be written, and raises ConfigError when the folder is another's or the disk too small."""
        self._check_folder()
        shards = range(len(self.starts) - 1)
        missing = [i for i in shards if not self._is_written(i)]
        size, free = self._bytes_of(missing), shutil.disk_usage(_existing(self.output)).free
        print(
            f"still to write: {len(missing):,} of {len(shards):,} shards, {_gib(size)}; free in "
            f"{self.output}: {_gib(free)}",
            flush=True,
        )
        require(
            size < free,
            f"the stored states need {_gib(size)} more and {self.output} has {_gib(free)}; make "
            "room, name another folder, or write less (--dtype float8, data.max_length)",
        )
        claim_folder(self.output, str(self.output))
        if not missing and (self.output / MANIFEST).is_file():
            self.layout.write_index(self.output, self.entries, self.starts)
            return []
        for shard in missing:  # what is known of a lost one is not of that which takes its place
            checksum_file(self._shard_path(shard)).unlink(missing_ok=True)
        names = {self.layout.shard_name(shard) for shard in missing}
        if known := known_checksums(self.output):
            keep_checksums(self.output, {n: c for n, c in known.items() if n not in names})
        write_json(self.output / UNFINISHED, self.manifest)
        (self.output / MANIFEST).unlink(missing_ok=True)  # of a folder that has lost a shard
        self.layout.write_index(self.output, self.entries, self.starts)
        return missing

    def write(
        self,
        missing: list[int],
        target: Target,
        *,
        micro_batch_size: int,
        tp_group: dist.ProcessGroup,
        dp_group: dist.ProcessGroup,
    ) -> None:
        """Write the missing shards, a share of them on each data-parallel rank; every rank calls
        it."""
        shares = [missing[i :: dp_group.size()] for i in range(dp_group.size())]
        passes = [sum(self._num_passes(i, micro_batch_size) for i in share) for share in shares]
        mine = dp_group.rank()
        is_main = dist.get_rank() == 0
        progress = Progress(passes[mine], "storing states", "batches", show=is_main)
        for shard in shares[mine]:
            tensors: dict[int, dict[str, torch.Tensor]] = {}
            for batch in self._batches(shard, micro_batch_size):
                tensors |= self._states(batch, target)
                progress.update()
            if tp_group.rank() == 0:
                self._write_shard(shard, [tensors[i] for i in sorted(tensors)])
        if target.lockstep:  # others still need this rank's part of the weights
            for _ in range(max(passes) - passes[mine]):
                target.states(Batch(self.data[0].input_ids[None, :1]))
        progress.close()

    def finish(self) -> None:
        """Give the manifest its name, on one rank, when all have written their shards."""
        if not (self.output / UNFINISHED).is_file():
            return
        absent = [i for i in range(len(self.starts) - 1) if not self._is_written(i)]
        require(
            not absent,
            f"shards {absent[:5]} of {self.output} are missing on the main rank; it must be on a "
            "file system that all nodes share. Where it is and shows files late, run the command "
            "again",
        )
        self._write_checksums()
        (self.output / UNFINISHED).replace(self.output / MANIFEST)

    def _write_shard(self, shard: int, samples: list[dict[str, torch.Tensor]]) -> None:
        """And its checksum beside it, until the folder has all of them in one file."""
        path = self._shard_path(shard)
        self.layout.write_shard(path, samples)
        write_json(checksum_file(path), checksum_of(path)._asdict())

    def _write_checksums(self) -> None:
        """Those of the shards are read again only where a kill came before they were kept."""
        known, found = known_checksums(self.output), {}
        paths = [self._shard_path(shard) for shard in range(len(self.starts) - 1)]
        for path in paths:
            beside = read_checksum(checksum_file(path))
            found[path.name] = beside or known.get(path.name) or checksum_of(path)
        found[self.layout.index] = checksum_of(self.output / self.layout.index)
        found[MANIFEST] = checksum_of(self.output / UNFINISHED)
        keep_checksums(self.output, found)
        for path in paths:
            checksum_file(path).unlink(missing_ok=True)

    def _states(self, batch: Sequence[int], target: Target) -> dict[int, dict[str, torch.Tensor]]:
        """What is kept of some samples."""
        samples = [self.data[i] for i in batch]
        ids = [sample.input_ids for sample in samples]
        states, kept = target.states(Batch(padded(ids))), {}
        for at, (i, sample) in enumerate(zip(batch, samples, strict=True)):
            own, last_hidden = slice(len(ids[at])), states.last_hidden
            last_hidden = None if last_hidden is None else last_hidden[at, own]
            check_finite(states.taps[at, own], last_hidden, sample=i)
            kept[i] = self.layout.sample_tensors(sample, states.taps[at, own], last_hidden)
        return kept

    def _batches(self, shard: int, size: int) -> Iterator[list[int]]:
        """The samples of a shard, those of like length together."""
        start, end = self.starts[shard : shard + 2]
        ordered = sorted(range(start, end), key=lambda i: len(self.data[i].input_ids))
        return (ordered[i : i + size] for i in range(0, len(ordered), size))

    def _num_passes(self, shard: int, size: int) -> int:
        start, end = self.starts[shard : shard + 2]
        return -(-(end - start) // size)

    def _check_folder(self) -> None:
        """ConfigError unless the folder is empty, or holds a part or all of these very states."""
        require(
            self.output.is_dir() or not self.output.exists(),
            f"{self.output} must be a folder and is a file; name another one",
        )
        found = self.output.iterdir() if self.output.exists() else []
        names = [path.name for path in found if path.name != LOCK]
        if all(name.startswith(PARTIAL) for name in names):  # killed in its first moment
            return
        manifests = [self.output / name for name in (MANIFEST, UNFINISHED)]
        known = [path for path in manifests if path.is_file()]
        require(
            bool(known),
            f"{self.output} must be empty or hold stored states, and has files but no {MANIFEST}; "
            "name another folder",
        )
        there = read_json(known[0])
        wrong = differences(there, self.manifest)
        if wrong:
            raise ConfigError(
                f"{self.output} holds the states of another job: {'; '.join(wrong)}. Name another "
                "folder, delete it, or take the settings that it was begun with"
            )

    def _bytes_of(self, shards: Sequence[int]) -> int:
        ranges = (slice(*self.starts[i : i + 2]) for i in shards)
        return sum(entry.nbytes for part in ranges for entry in self.entries[part])

    def _is_written(self, shard: int) -> bool:
        """Whether it is there, and not cut short."""
        path = self._shard_path(shard)
        return path.is_file() and self.layout.is_whole(path, self._bytes_of([shard]))

    def _shard_path(self, shard: int) -> Path:
        return self.output / self.layout.shard_name(shard)


def _shard_starts(sizes: list[int], shard_bytes: int) -> list[int]:
    """The first sample of each shard of at most so many bytes (or one sample), and the end."""
    starts, held = [0], 0
    for i, size in enumerate(sizes):
        if held and held + size > shard_bytes:
            starts.append(i)
            held = 0
        held += size
    return [*starts, len(sizes)]


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3f} GiB"
