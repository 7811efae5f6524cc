"""Samples on disk: a folder that is written once and then mapped by every process that reads it.

Four arrays in numpy's own format (`numpy.load(..., mmap_mode="r")`), a manifest that says what they
are of, and checksums. Shapes: n samples, t tokens of all of them.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy.lib import format as npy

from dspark_megatron.data.dataset import DTYPES, SampleArrays, TokenizedSamples, fingerprint_of
from dspark_megatron.data.rules import DropReport
from dspark_megatron.data.sampler import Shares
from dspark_megatron.data.tokenizing.collecting import Streams, Tokenizing
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.checksums import (
    CHECKSUMS,
    NotAsWritten,
    compare,
    read_checksums,
    write_checksums,
)
from dspark_megatron.storage.writing import disk_named, write_json

FORMAT = "dspark-megatron tokens, version 1"
MANIFEST = "manifest.json"
_OWN_NAMES = {MANIFEST, CHECKSUMS, *(f"{name}.npy" for name in SampleArrays._fields)}
_SHARES = "fingerprint_"
"""Begins the name of a file that keeps the fingerprint of these samples in certain shares."""
_MOST_MANIFEST_BYTES = 2**28
_MOST_SHOWN = 4

Facts = dict[str, Any]
"""JSON of all that decides which tokens a store has."""


def store_name(facts: Facts) -> str:
    """The name of the folder of these samples."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    return f"tokens_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def is_token_store(folder: Path) -> bool:
    """By the names of its files; it may be damaged."""
    return _path(folder, "token_ids").is_file()


def write_store(folder: Path, facts: Facts, work: Tokenizing) -> Iterator[None]:
    """Tokenize into an empty folder; a step for each batch of lines. ConfigError when the disk
    refuses, and as `Tokenizing.into`."""
    with disk_named(folder):
        with _streams(folder) as streams:
            yield from work.into(streams)
        arrays = _map_arrays(folder)
        manifest = {
            "format": FORMAT,
            "facts": facts,
            "samples": work.report.kept,
            "tokens": work.report.total_tokens,
            "fingerprint": fingerprint_of(arrays, None),
            "report": work.report.content(),
            "files": [str(file.path) for file in work.files],
            "starts": work.starts,
            "sizes": work.sizes,
        }
        del arrays
        write_json(folder / MANIFEST, manifest)
        write_checksums(folder)


@contextlib.contextmanager
def _streams(folder: Path) -> Iterator[Streams]:
    """Files of arrays whose lengths are known at the end: then their headers are written again."""
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(_path(folder, n).open("w+b")) for n in Streams._fields]
        for file, dtype in zip(files, DTYPES, strict=True):
            _write_header(file, dtype, 0)
        starts = [file.tell() for file in files]
        yield Streams(*files)
        for file, dtype, start in zip(files, DTYPES, starts, strict=True):
            length = (file.tell() - start) // dtype.itemsize
            file.seek(0)
            _write_header(file, dtype, length)
            assert file.tell() == start, "numpy pads headers, so that an array can grow"
            file.flush()
            os.fsync(file.fileno())


def _write_header(file: BinaryIO, dtype: numpy.dtype, length: int) -> None:
    header = {"shape": (length,), "fortran_order": False, "descr": npy.dtype_to_descr(dtype)}
    npy.write_array_header_1_0(file, header)


class TokenStore:
    """A store that is whole."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """NotAsWritten where its arrays are not those that the manifest speaks of."""
        self.folder = folder
        try:
            arrays = _map_arrays(folder)
            self.samples = TokenizedSamples(
                arrays,
                DropReport.of(manifest["report"]),
                [Path(name) for name in manifest["files"]],
                list(manifest["starts"]),
                list(manifest["sizes"]),
            )
            self._fingerprint = str(manifest["fingerprint"])
            samples, tokens = int(manifest["samples"]), int(manifest["tokens"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NotAsWritten(folder, f"{type(error).__name__}: {error}") from error
        offsets, wanted = arrays.offsets, (tokens, tokens, samples + 1, samples)
        whole = (
            tuple(map(len, arrays)) == wanted
            and (offsets[0], offsets[-1]) == (0, tokens)
            and bool((numpy.diff(offsets) > 0).all())
        )
        if not whole:
            raise NotAsWritten(folder, "its arrays do not belong together")

    @classmethod
    def open(cls, folder: Path, facts: Facts, *, full: bool = False) -> "TokenStore | None":
        """None where there is none. NotAsWritten for one that is damaged or cut short; ConfigError
        for a folder that holds anything else. full: read every byte and compare its checksum."""
        if not os.path.lexists(folder):
            return None
        _check_own(folder)
        try:
            known = read_checksums(folder)
            if known is None or not _OWN_NAMES - {CHECKSUMS} <= known.keys():
                raise NotAsWritten(folder / CHECKSUMS, "it is not there, or lacks files")
            compare(folder, known, full=full)
            manifest = _read_manifest(folder)
        except OSError as error:
            raise ConfigError(f"cannot read {folder}: {error.strerror}") from error
        _check_facts(folder, manifest, facts)
        return cls(folder, manifest)

    def fingerprint(self, shares: Shares | None) -> str | None:
        """That of the data set; None where it must be computed."""
        if shares is None:
            return self._fingerprint
        try:
            kept = json.loads(self._shares_file(shares).read_text(encoding="utf-8"))
            return kept["fingerprint"] if kept["of"] == self._fingerprint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_fingerprint(self, shares: Shares, fingerprint: str) -> None:
        """For the next start. Where the folder is read-only it is computed each time."""
        content = {"of": self._fingerprint, "shares": shares, "fingerprint": fingerprint}
        with contextlib.suppress(ConfigError):
            write_json(self._shares_file(shares), content)

    def _shares_file(self, shares: Shares) -> Path:
        digest = hashlib.sha256(repr(tuple(map(tuple, shares))).encode()).hexdigest()[:16]
        return self.folder / f"{_SHARES}{digest}.json"


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _map_arrays(folder: Path) -> SampleArrays:
    """Pages of the files, shared by all processes of a machine. ValueError for anything else."""
    found = []
    for name, dtype in zip(SampleArrays._fields, DTYPES, strict=True):
        path = _path(folder, name)
        with path.open("rb") as file:
            is_empty = npy.read_magic(file) and npy.read_array_header_1_0(file)[0] == (0,)
        mode = None if is_empty else "r"  # nothing can be mapped
        array = numpy.load(path, mmap_mode=mode, allow_pickle=False)
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(f"{path.name} holds {array.dtype} of {array.ndim} dimensions")
        found.append(array)
    return SampleArrays(*found)


def _check_own(folder: Path) -> None:
    """ConfigError unless all that is there is a store's."""
    way_out = "move it away, or name another data.cache_dir"
    require(folder.is_dir(), f"{folder} must be a folder of tokenized data and is none; {way_out}")
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ConfigError(f"cannot read {folder}: {error.strerror}; {way_out}") from error
    strange = sorted(name for name in names - _OWN_NAMES if not name.startswith((_SHARES, ".")))
    require(
        bool(names & _OWN_NAMES) and not strange,
        f"{folder} must hold tokenized data ({', '.join(sorted(_OWN_NAMES))}), and has "
        f"{', '.join(strange[:_MOST_SHOWN]) or 'nothing'}; {way_out}",
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if path.stat().st_size > _MOST_MANIFEST_BYTES:
        raise NotAsWritten(path, f"it has {path.stat().st_size:,} bytes")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise NotAsWritten(path, f"it is no JSON: {error}") from error


def _check_facts(folder: Path, manifest: dict[str, Any], facts: Facts) -> None:
    """ConfigError for the store of other samples, put in the place of these."""
    way_out = "it was renamed or changed; delete it, or name another data.cache_dir"
    require(
        manifest.get("format") == FORMAT,
        f"{folder} says that it holds {manifest.get('format')!r:.60} and not {FORMAT!r}: {way_out}",
    )
    there, here = manifest.get("facts"), json.loads(json.dumps(facts))
    if there == here:
        return
    known = there if isinstance(there, dict) else {}
    differ = [name for name in {**here, **known} if known.get(name) != here.get(name)]
    shown = (f"{n} ({known.get(n)!r:.60} there, {here.get(n)!r:.60} here)" for n in differ)
    raise ConfigError(
        f"{folder} holds samples of other {', '.join(list(shown)[:_MOST_SHOWN])}: {way_out}"
    )
