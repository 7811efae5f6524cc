"""The files that an entry of data.train_files stands for."""

import difflib
import glob
import os
from pathlib import Path
from typing import Any, NamedTuple

from dspark_megatron.data.files.datasets_library import (
    PREFIX,
    DatasetRows,
    is_saved,
    open_dataset,
    open_saved,
)
from dspark_megatron.errors import ConfigError, require

PACKED = ("gz", "bz2", "xz", "zst")
NAMES = ("*.jsonl", *(f"*.jsonl.{end}" for end in PACKED), "*.idx", "*.parquet")
"""The files of a folder that are read."""
FOREIGN_NAMES = "*.arrow *.zst *.csv *.tsv *.ndjson *.json *.json.*".split()
"""Files of a folder with data that is not read."""
NO_DATA = ("dataset_info.json", "dataset_infos.json", "state.json")
"""Files in which Hugging Face's datasets describe themselves."""


class DataFile(NamedTuple):
    path: Path
    """A file of lines or rows, or the prefix of a Megatron indexed dataset: the names of its two
    files without `.bin` and `.idx`. Of rows of the library `datasets` what messages call them."""
    indexed: bool
    dataset: DatasetRows | None = None

    def identity(self) -> dict[str, Any]:
        """What tells this file from another, or from what it was before somebody wrote to it: JSON
        of texts and whole numbers. OSError if it is gone."""
        if self.dataset is not None:
            return self.dataset.identity()
        parts = [f"{self.path}.idx", f"{self.path}.bin"] if self.indexed else [self.path]
        found = [os.stat(part) for part in parts]
        return {
            "path": os.path.realpath(self.path),
            "indexed": self.indexed,
            "bytes": [part.st_size for part in found],
            "modified_ns": [part.st_mtime_ns for part in found],
        }


def find_files(entry: str | Path, *, or_else: str = "") -> list[DataFile]:
    """The files of an entry, sorted by name. It may be a file, the prefix of an indexed dataset, a
    folder (its files of NAMES), a glob of these, or a data set of the library `datasets`.
    ConfigError if there is none. or_else: what else the entry might have been, for the message."""
    require(bool(str(entry).strip()), "an entry of data files is empty; name a file")
    path = Path(entry)
    if str(entry).startswith(PREFIX):
        return [DataFile(path, indexed=False, dataset=open_dataset(str(entry)))]
    if os.path.isdir(path):  # false, where Path.is_dir raises for a name that is too long
        return _files_of_folder(path)
    if os.path.isfile(path) or os.path.isfile(f"{path}.idx"):
        return [_data_file(path)]
    matches = sorted(glob.glob(str(entry), recursive=True))
    require(
        bool(matches),
        f"data file {entry} must exist: a JSONL or Parquet file, the prefix of a Megatron indexed "
        f"dataset (PREFIX.bin and PREFIX.idx), a folder, a glob of these, or {PREFIX}NAME"
        f"{or_else}{_nearest(path)}",
    )
    files = [file for match in matches for file in _files_of_match(Path(match))]
    return _once(files)


def _nearest(path: Path) -> str:
    names = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(path.name[:100], names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _files_of_match(path: Path) -> list[DataFile]:
    return _files_of_folder(path) if path.is_dir() else [_data_file(path)]


def _once(files: list[DataFile]) -> list[DataFile]:
    """Each file once: a glob may match both files of an indexed dataset, and a file again through
    a link to a folder above it."""
    once: dict[str, DataFile] = {}
    for file in files:
        once.setdefault(os.path.realpath(file.path), file)
    return list(once.values())


def _files_of_folder(path: Path) -> list[DataFile]:
    """Raises ConfigError also for a folder with data that would be passed over, or that may be the
    same data in two forms."""
    if is_saved(path):
        return [DataFile(path, indexed=False, dataset=open_saved(path))]
    found = sorted(file for name in NAMES for file in path.glob(name))
    others = {file.name for name in FOREIGN_NAMES for file in path.glob(name)}
    foreign = sorted(others.difference(NO_DATA, (file.name for file in found)))
    require(
        not foreign,
        f"the data folder {path} has {len(foreign)} files of data that are not read "
        f"({', '.join(foreign[:3])}); write them as JSONL, or name the files that are meant",
    )
    tables = [file for file in found if file.suffix == ".parquet"]
    require(
        len(tables) in (0, len(found)),
        f"the data folder {path} has {len(tables)} Parquet files beside {len(found) - len(tables)} "
        f"others, which may be the same data; name those that are meant, such as {path}/*.parquet",
    )
    require(bool(found), f"the data folder {path} must hold {', '.join(NAMES)} files")
    return [_data_file(file) for file in found]


def _data_file(path: Path) -> DataFile:
    require(
        path.is_file() or not os.path.lexists(path),
        f"data file {path} must be a file, and is a folder, pipe or device, or a link that leads "
        "nowhere; take it out",
    )
    is_part = path.suffix in (".idx", ".bin") and path.is_file()
    if path.is_file() and not is_part:
        return DataFile(path, indexed=False)
    prefix = path.with_suffix("") if is_part else path
    for name in (f"{prefix}.idx", f"{prefix}.bin"):
        require(Path(name).is_file(), f"the indexed dataset {prefix} lacks {name}")
    return DataFile(prefix, indexed=True)


def check_apart(trained: list[str], held_out: list[str]) -> None:
    """ConfigError if a file would be both trained on and held out. Of the library `datasets` rows
    of one split may be, but not the same."""
    files = [file for entry in trained for file in find_files(entry)]
    paths = {os.path.realpath(file.path) for file in files if file.dataset is None}
    rows = [file.dataset for file in files if file.dataset is not None]

    def is_trained_on(file: DataFile) -> bool:
        if file.dataset is None:
            path = os.path.realpath(file.path)
            return path in paths or any(path in part.files for part in rows)
        return not paths.isdisjoint(file.dataset.files) or any(map(file.dataset.overlaps, rows))

    found = [file for entry in held_out for file in find_files(entry)]
    both = [str(file.path) for file in found if is_trained_on(file)]
    if both:
        raise ConfigError(
            f"evaluate.heldout_files must not be trained on, and {', '.join(both)} is in "
            "data.train_files; take some of its lines out into a file of their own"
        )
