"""Whether stored states are as they were written: by size when they are opened, by their checksums
and values in the background of training.
"""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.checksums import (
    CHECKSUMS,
    Checksum,
    Checksums,
    NotAsWritten,
    compare,
    compare_content,
    compare_size,
    parsed,
    read_checksums,
)
from dspark_megatron.targets.stored.layout import KeptStates, StatesReader


def checksum_file(shard: Path) -> Path:
    """Where the checksum of a shard is until those of all are in one file."""
    return shard.with_name(f"crc32_{shard.name}.json")


def read_checksum(file: Path) -> Checksum | None:
    """None where there is none: then the shard is read."""
    try:
        return parsed(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def known_checksums(folder: Path) -> Checksums:
    """Of a folder; ConfigError where they cannot be read."""
    try:
        return read_checksums(folder) or {}
    except NotAsWritten as error:
        raise _damaged(error) from error


def check_files(folder: Path) -> Checksums:
    """Every file that a finished folder was written with is there and as long; small ones are
    compared. ConfigError for the first that is not. The checksums, none of an older version's."""
    known = known_checksums(folder)
    try:
        compare(folder, known, full=False)
    except NotAsWritten as error:
        raise _damaged(error) from error
    return known


class ShardChecks:
    """A rank's share of the shards, each read once and compared."""

    def __init__(
        self, reader: StatesReader, checksums: Checksums, *, rank: int, ranks: int
    ) -> None:
        self._reader, self._checksums = reader, checksums
        self._left = dict(list(reader.shards().items())[rank::ranks])
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="states-checker", daemon=True)

    def start(self) -> None:
        """Read in the background."""
        self._thread.start()

    def raise_if_damaged(self) -> None:
        """ConfigError once a shard was found that is not as it was written."""
        if self._error is not None:
            raise self._error

    def is_done(self, seconds: float) -> bool:
        """Whether all are read, within so long; ConfigError as above."""
        self._thread.join(seconds)
        self.raise_if_damaged()
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.check()
        except BaseException as error:  # told to the thread that trains
            self._error = error

    def check(self) -> None:
        """Now. ConfigError that names the shard."""
        for name, places in self._left.items():
            check_shard(self._reader, name, places, self._checksums.get(name))


def check_shard(
    reader: StatesReader, name: str, places: Sequence[int], checksum: Checksum | None
) -> None:
    """ConfigError unless a shard has its checksum, if that is known, and its states are numbers."""
    path = reader.path / name
    try:
        if checksum is not None:
            compare_size(path, checksum.size)
            compare_content(path, checksum)
        for place in places:
            if problem := _problem(reader.states(place)):
                raise NotAsWritten(path, f"sample {place} (from 0): {problem}")
    except NotAsWritten as error:
        raise _damaged(error) from error
    except OSError as error:
        raise _damaged(NotAsWritten(path, error.strerror or str(error))) from error


def check_finite(taps: Tensor, last_hidden: Tensor | None, *, sample: int) -> None:
    """ConfigError for states of a target that are to be stored and are no numbers. sample: its
    place among those that are kept."""
    for name, tensor in (("taps", taps), ("last hidden states", last_hidden)):
        require(
            tensor is None or is_finite(tensor),
            f"the target's {name} of sample {sample} (from 0, of those that are kept) are not "
            "finite, and nothing can be learnt from them; load the target in another type "
            "(target.dtype) or leave that sample out",
        )


def is_finite(tensor: Tensor) -> bool:
    """Its least and greatest number are NaN where any is."""
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


def _problem(states: KeptStates) -> str:
    """What is wrong with the states of a sample, as numbers; empty if nothing is."""
    for name, tensor in (("taps", states.taps), ("last hidden states", states.last_hidden)):
        if tensor is None or not tensor.numel():
            continue
        low, high = tensor.aminmax()  # NaN where any is
        if not (low.isfinite() and high.isfinite()):
            return f"its {name} are not finite"
        if low == high == 0:
            return f"its {name} are all zero"
    return ""


def _damaged(error: NotAsWritten) -> ConfigError:
    return ConfigError(
        f"{error.path} is damaged ({error.reason}); copy it again, or delete it and run the "
        "command that stored the states, which writes what is missing"
        + (f" ({CHECKSUMS} goes with the rest)" if error.path.name == CHECKSUMS else "")
    )
