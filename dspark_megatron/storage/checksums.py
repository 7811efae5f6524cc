"""Checksums of the files of a folder: written with them, compared when they are read again.

`checksums.json` has the size and the CRC-32 of every other file of its folder. They tell a file
that was damaged, or put in the place of another, from the one that was written; they are no guard
against somebody who writes both.
"""

import json
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from dspark_megatron.storage.writing import PARTIAL, write_json

CHECKSUMS = "checksums.json"
_READ_ANYWAY = 64 * 2**20
"""Bytes of a folder that are compared in full whenever it is opened, of its smallest files."""
_BLOCK = 8 * 2**20


class Checksum(NamedTuple):
    size: int
    crc32: str
    """Eight hexadecimal digits."""


class NotAsWritten(Exception):
    """A file is not as it was when its checksum was made."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


Checksums = dict[str, Checksum]
"""By the names of files."""


def checksum_of(path: Path) -> Checksum:
    """Reads the file once, a block at a time."""
    size = value = 0
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            value = zlib.crc32(block[:count], value)
            size += count
    return Checksum(size, f"{value:08x}")


def checksums_of_rank(folder: Path) -> Checksums:
    """Of the shards of a checkpoint that this rank has written."""
    paths = list(folder.glob(f"__{dist.get_rank()}_*"))
    with ThreadPoolExecutor() as threads:  # CRC-32 leaves Python's lock
        return dict(zip((p.name for p in paths), threads.map(checksum_of, paths), strict=True))


def write_checksums(folder: Path, known: Mapping[str, Checksum] | None = None) -> None:
    """Of all files that are in the folder, and of those that are `known`: they are not read again,
    and a network file system may show them late."""
    found = dict(known or {})
    for path in folder.iterdir():
        passed_over = path.name == CHECKSUMS or path.name.startswith(PARTIAL)
        if path.name not in found and path.is_file() and not passed_over:
            found[path.name] = checksum_of(path)
    keep_checksums(folder, found)


def keep_checksums(folder: Path, checksums: Checksums) -> None:
    content = {name: one._asdict() for name, one in sorted(checksums.items())}
    write_json(folder / CHECKSUMS, {"algorithm": "crc32", "files": content})


def read_checksums(folder: Path) -> Checksums | None:
    """None where there are none: an older version wrote the folder. NotAsWritten for a file that
    holds anything else."""
    path = folder / CHECKSUMS
    if not path.exists() and not path.is_symlink():
        return None
    if not path.is_file():
        raise NotAsWritten(path, "it is no file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: parsed(entry) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotAsWritten(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error


def parsed(entry: object) -> Checksum:
    """What JSON has of one. ValueError, TypeError or KeyError for anything else."""
    size, crc32 = entry["size"], entry["crc32"]  # type: ignore[index]
    if not isinstance(size, int) or not re.fullmatch("[0-9a-f]{8}", crc32):
        raise ValueError(f"{entry!r:.80} is no checksum")
    return Checksum(size, crc32)


def compare(folder: Path, wanted: Checksums, *, full: bool) -> None:
    """NotAsWritten for the first file that is missing or has another size or CRC-32. Unless `full`,
    large files are known by their sizes."""
    for name, was in wanted.items():
        compare_size(folder / name, was.size)
    left = _READ_ANYWAY
    for name, was in sorted(wanted.items(), key=lambda item: item[1].size):
        left -= was.size
        if full or left >= 0:
            compare_content(folder / name, was)


def compare_content(path: Path, was: Checksum) -> None:
    """NotAsWritten where the file has another CRC-32. Reads all of it."""
    found = checksum_of(path).crc32
    if found != was.crc32:
        raise NotAsWritten(path, f"its CRC-32 is {found}, and was {was.crc32} when saved")


def compare_size(path: Path, size: int) -> None:
    """NotAsWritten where the file is missing or has another size. Reads nothing."""
    if not path.is_file():
        raise NotAsWritten(path, f"it is not there, and had {size:,} bytes when it was saved")
    found = path.stat().st_size
    if found != size:
        how = "cut short" if found < size else "of another save"
        raise NotAsWritten(path, f"{how}: it has {found:,} bytes, and had {size:,} when saved")
