"""Data sets that the library `datasets` reads: of the Hub, saved by it, or folders that it knows.

No code of a data set is run: the library has no scripts since its version 4, and only data of
tables is taken.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dspark_megatron.data.files.columns import makers
from dspark_megatron.data.files.opening import needed
from dspark_megatron.data.files.tables import BATCH_ROWS, Table, check_stream_end
from dspark_megatron.errors import ConfigError, require

PREFIX = "hf:"
FORM = "hf:NAME[@REVISION][:CONFIGURATION][:SPLIT]"
LOCAL = ("/", "./", "../", "~")
"""What a name begins with if it is a folder here and not one of the Hub."""
BUILDERS = {"parquet", "arrow", "json", "csv", "text", "cache"}
"""Forms of data that the library may read for us: tables of texts and numbers."""


class Entry(NamedTuple):
    name: str
    """Of the Hub, or a folder."""
    revision: str | None = None
    configuration: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """ConfigError for what has not the form `FORM`."""
        parts = re.split(r":(?![^\[]*\])", text.removeprefix(PREFIX))  # not within [...]
        named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", parts[0])
        is_local = parts[0].startswith(LOCAL) and not parts[0].startswith("//")
        require(
            len(parts) <= 3 and all(parts) and (named is not None or is_local),
            f"data file {text} must have the form {FORM}, with OWNER/NAME on the Hub, or a folder "
            f"here that begins with {', '.join(LOCAL[:-1])} or {LOCAL[-1]}",
        )
        name, revision = os.path.expanduser(parts[0]), None
        if named is not None and not is_local:
            name, revision = named.groups()
        split = parts[-1] if len(parts) > 1 else None
        return cls(name, revision, parts[1] if len(parts) == 3 else None, split)

    @property
    def is_local(self) -> bool:
        return self.name.startswith(LOCAL)


@dataclass(frozen=True)
class DatasetRows:
    """Rows of a data set, in its order."""

    source: str
    """A folder of save_to_disk, or name, configuration, version and hash of a data set. Equal
    sources have equal splits."""
    ranges: tuple[tuple[str, int, int], ...]
    """Splits, each with the first row that is used and the one after the last."""
    rows: Any = field(compare=False, repr=False)
    """A datasets.Dataset."""
    files: frozenset[str] = frozenset()
    """Real paths of the files here that these splits were read from, whatever their ranges."""

    def table(self, path: Path) -> Table:
        found = makers(path, self.rows.data.schema)
        chosen = self.rows.select_columns(list(found)).with_format("arrow")
        return Table(path, found, _batches(chosen))

    def overlaps(self, other: "DatasetRows") -> bool:
        return self.source == other.source and any(
            split == name and max(start, first) < min(end, last)
            for split, start, end in self.ranges
            for name, first, last in other.ranges
        )

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others, or from what they were before somebody wrote to their
        folder."""
        is_folder = os.path.isabs(self.source)
        files = [os.stat(found["filename"]) for found in self.rows.cache_files if is_folder]
        return {
            "source": self.source,
            "ranges": [list(part) for part in self.ranges],
            "fingerprint": self.rows._fingerprint,
            "bytes": [file.st_size for file in files],
            "modified_ns": [file.st_mtime_ns for file in files],
            "changed_ns": [file.st_ctime_ns for file in files],
        }


def _batches(rows: Any) -> Iterator[Any]:
    for table in rows.iter(BATCH_ROWS):
        yield from table.to_batches()


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def open_saved(folder: str | Path, text: str = "", split: str | None = None) -> DatasetRows:
    """The rows of a split, or of the only one, of a folder that `save_to_disk` wrote. ConfigError,
    in one sentence, if there are none."""
    folder = os.path.realpath(folder)
    text = text or f"{PREFIX}{folder}"
    datasets = _library(text)
    try:
        found = datasets.load_from_disk(folder)
        splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
        for rows in splits.values():
            for file in rows.cache_files:
                check_stream_end(file["filename"])
    except ConfigError:
        raise
    except Exception as error:  # whatever a damaged file makes the library raise
        raise ConfigError(f"cannot read the data set {folder}: {_said(error)}") from error
    files = {name: [file["filename"] for file in rows.cache_files] for name, rows in splits.items()}
    return _chosen(text, split, splits, folder, files)


def open_dataset(text: str) -> DatasetRows:
    """The rows that an entry means. ConfigError, in one sentence, if there are none."""
    entry = Entry.parse(text)
    if not entry.is_local:
        require(
            not os.path.isdir(entry.name),
            f"{text} is a name of the Hub, and there is a folder {entry.name} here; write "
            f"{PREFIX}./{entry.name} if it is meant",
        )
        return _open_remote(text)
    require(os.path.isdir(entry.name), f"data file {text} must exist, and there is no such folder")
    if not is_saved(Path(entry.name)):
        return _load(text, entry)
    require(
        entry.configuration is None,
        f"{text} is a folder of save_to_disk, which has no configurations; name a split alone",
    )
    return open_saved(entry.name, text, entry.split)


@functools.lru_cache(maxsize=64)
def _open_remote(text: str) -> DatasetRows:
    """Asked for once a process, so that a name means the same rows to the end."""
    return _load(text, Entry.parse(text))


def _library(what: str) -> Any:
    datasets = needed("datasets", what)
    require(
        int(datasets.__version__.partition(".")[0]) >= 4,
        f"{what} needs datasets 4 or newer, which runs no code of data sets, and "
        f"{datasets.__version__} is installed; pip install -U datasets",
    )
    return datasets


def _load(text: str, entry: Entry) -> DatasetRows:
    """What the Hub has is downloaded into the library's cache."""
    datasets = _library(text)
    try:
        builder = datasets.load_dataset_builder(
            entry.name, entry.configuration, revision=entry.revision
        )
        _check_builder(text, entry, builder)
        builder.download_and_prepare()
        found = builder.as_dataset()
    except ConfigError:
        raise
    except ConnectionError as error:
        raise ConfigError(
            f"{text} is not in the cache of datasets, and the Hub cannot be reached "
            f"({_said(error)}); load it where there is a network and name the folder of its "
            "files, or set HF_HOME to a folder that has it"
        ) from error
    except Exception as error:  # whatever a repository of others makes the library raise
        raise ConfigError(f"cannot load {text}, which means {FORM}: {_said(error)}") from error
    source = "/".join(Path(builder.cache_dir).parts[-4:])
    return _chosen(text, entry.split, found, source, builder.config.data_files or {})


def _check_builder(text: str, entry: Entry, builder: Any) -> None:
    """Tables only, and of the revision that was asked for: without a network the library takes
    whatever it has of a name."""
    kind = type(builder).__module__.rpartition(".")[2]
    require(
        kind in BUILDERS,
        f"{text} holds data of the form {kind}, and tables of texts are read "
        f"({', '.join(sorted(BUILDERS))})",
    )
    require(
        kind != "cache" or entry.revision is None or str(builder.hash).startswith(entry.revision),
        f"{text} asks for a revision, the Hub cannot be reached, and the cache has {builder.hash}; "
        "write that one, or load it where there is a network",
    )


def _said(error: Exception) -> str:
    """What an error says, and the error behind it, in one line."""
    errors = [error] if error.__cause__ is None else [error, error.__cause__]
    texts = [" ".join(str(e).split())[:300].rstrip(".") or type(e).__name__ for e in errors]
    return ": ".join(texts)


def _chosen(
    text: str,
    split: str | None,
    splits: dict[Any, Any],
    source: str,
    files: Mapping[Any, Sequence[str]],
) -> DatasetRows:
    """The rows of the split, which may be a slice or a sum as the library has them. files: those of
    each split."""
    datasets = _library(text)
    sizes = {str(name): rows.num_rows for name, rows in splits.items()}
    known = ", ".join(f"{name} ({rows:,} rows)" for name, rows in sizes.items()) or "none"
    require(
        split is not None or len(sizes) == 1,
        f"{text} has the splits {known}; name one: {text}:{next(iter(sizes), 'SPLIT')}",
    )
    try:
        instruction = datasets.ReadInstruction.from_spec(split or next(iter(sizes)))
        parts = instruction.to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{text}: {_said(error)} (its splits: {known})") from error
    ranges = tuple((part.splitname, part.from_, max(part.from_, part.to)) for part in parts)
    require(any(end > start for _, start, end in ranges), f"{text} has no rows; it has {known}")
    rows = [splits[name].select(range(start, end)) for name, start, end in ranges]
    read = (os.path.realpath(file) for name, _, _ in ranges for file in files.get(name, ()))
    return DatasetRows(source, ranges, datasets.concatenate_datasets(rows), frozenset(read))
