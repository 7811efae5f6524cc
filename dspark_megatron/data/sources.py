"""Which files an entry of data.train_files stands for."""

import glob
from pathlib import Path
from typing import NamedTuple

from dspark_megatron.config import ConfigError, require


class DataFile(NamedTuple):
    path: Path
    """A JSONL file, or the prefix of a Megatron indexed dataset: its names without `.bin` and
    `.idx`."""
    indexed: bool


def find_files(entry: str | Path) -> list[DataFile]:
    """The files of an entry, by name: a JSONL file, the prefix of an indexed dataset, a folder
    (its `*.jsonl` and `*.idx`) or a glob of these. ConfigError when there is none."""
    path = Path(entry)
    if path.is_dir():
        found = sorted([*path.glob("*.jsonl"), *path.glob("*.idx")])
        require(bool(found), f"the data folder {path} must hold *.jsonl or *.idx files")
        return [_data_file(file) for file in found]
    if path.is_file() or Path(f"{path}.idx").is_file():
        return [_data_file(path)]
    matches = sorted(glob.glob(str(entry), recursive=True))
    require(
        bool(matches),
        f"data file {entry} must exist: a JSONL file, the prefix of a Megatron indexed dataset "
        "(PREFIX.bin and PREFIX.idx), a folder or a glob of these",
    )
    files = [file for match in matches for file in find_files(match)]
    return list(dict.fromkeys(files))  # a glob may match both files of an indexed dataset


def _data_file(path: Path) -> DataFile:
    is_part = path.suffix in (".idx", ".bin") and path.is_file()
    if path.is_file() and not is_part:
        return DataFile(path, indexed=False)
    prefix = path.with_suffix("") if is_part else path
    for name in (f"{prefix}.idx", f"{prefix}.bin"):
        require(Path(name).is_file(), f"the indexed dataset {prefix} lacks {name}")
    return DataFile(prefix, indexed=True)


def check_apart(trained: list[str], held_out: list[str]) -> None:
    """ConfigError if a file is both trained on and held out."""
    files = {file.path.resolve() for entry in trained for file in find_files(entry)}
    both = [
        str(file.path)
        for entry in held_out
        for file in find_files(entry)
        if file.path.resolve() in files
    ]
    if both:
        raise ConfigError(
            f"evaluate.heldout_files must not be trained on, and {', '.join(both)} is in "
            "data.train_files; take some of its lines out into a file of their own"
        )
