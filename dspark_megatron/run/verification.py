"""Whether what a run has stored is sound: every file of checkpoints, stored states and tokenized
data, in full."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dspark_megatron.conversion.target_match import not_finite
from dspark_megatron.data.token_store import is_token_store
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.run.states import reader_of_states
from dspark_megatron.storage.checkpoints.damage import Damage
from dspark_megatron.storage.checkpoints.meta import iteration_of
from dspark_megatron.storage.checkpoints.whole import check_whole, iterations_in
from dspark_megatron.storage.checksums import (
    CHECKSUMS,
    Checksum,
    NotAsWritten,
    compare_content,
    compare_size,
    read_checksums,
)
from dspark_megatron.storage.training_checkpoint import CheckpointReader
from dspark_megatron.targets.stored.layout import MANIFEST, UNFINISHED, read_manifest
from dspark_megatron.targets.stored.verification import check_shard


@dataclass(frozen=True)
class Verdict:
    """On a file, or on a folder as a whole."""

    path: Path
    damage: str = ""
    """Empty where there is none."""
    note: str = "as it was written"

    def __str__(self) -> str:
        return f"{self.path}: {f'DAMAGED: {self.damage}' if self.damage else self.note}"


def verify(path: Path) -> Iterator[Verdict]:
    """One for each file, and one for each checkpoint whose files are all sound. ConfigError for a
    path that is neither a checkpoint, a run with some, stored states nor tokenized data."""
    if is_token_store(path):
        yield from _of_files(path)
        return
    if any((path / name).is_file() for name in (MANIFEST, UNFINISHED)):
        yield from _of_files(path)
        yield from _of_states(path)
        return
    is_one = iteration_of(path) is not None
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoints = [path] if is_one else list(iterations_in(folder).values())
    require(
        bool(checkpoints),
        f"{path} holds neither a draft nor checkpoints nor stored states nor tokenized data; give "
        "a draft's folder, a run, an iter_* folder, a tokens_* folder or stored states",
    )
    for checkpoint in checkpoints:
        of_files = list(_of_files(checkpoint))
        yield from of_files
        if not any(one.damage for one in of_files):  # which the whole would only repeat
            yield _of_checkpoint(checkpoint)


def _of_files(folder: Path) -> Iterator[Verdict]:
    try:
        known = read_checksums(folder)
    except NotAsWritten as error:
        yield Verdict(error.path, error.reason)
        return
    if known is None:
        yield Verdict(folder / CHECKSUMS, note="not there: an older version wrote the folder")
        return
    for name, checksum in sorted(known.items()):
        yield Verdict(folder / name, _damage(folder / name, checksum))


def _damage(path: Path, checksum: Checksum) -> str:
    try:
        compare_size(path, checksum.size)
        compare_content(path, checksum)
    except NotAsWritten as error:
        return error.reason
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _of_checkpoint(checkpoint: Path) -> Verdict:
    """Its structure, and the values of the draft."""
    try:
        check_whole(checkpoint)
        reader = CheckpointReader(checkpoint)
        bad = [line for name in reader.names() for line in not_finite(name, reader.tensor(name))]
    except ConfigError as error:
        cause = error.__cause__
        return Verdict(checkpoint, cause.what if isinstance(cause, Damage) else str(error))
    return Verdict(checkpoint, "; ".join(bad), "complete, and its weights are finite")


def _of_states(folder: Path) -> Iterator[Verdict]:
    """The values of every shard."""
    try:
        reader = reader_of_states(folder, read_manifest(folder))
        shards = reader.shards()
    except ConfigError as error:
        yield Verdict(folder, str(error))
        return
    for name, places in sorted(shards.items()):
        try:
            check_shard(reader, name, places, None)
            yield Verdict(folder / name, note=f"states of {len(places):,} samples are finite")
        except ConfigError as error:
            yield Verdict(folder / name, str(error))
