"""Files and folders that appear whole or not at all.

A file is written beside its place under a name that begins with `.partial_`, flushed to the disk
and renamed; whoever owns a folder removes what killed writers left there.
"""

import contextlib
import glob
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspark_megatron.errors import ConfigError, require

PARTIAL = ".partial_"


@contextlib.contextmanager
def disk_named(path: Path) -> Iterator[None]:
    """What the disk refuses inside, such as room, is a ConfigError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; make room there or choose another "
            "folder"
        ) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write a file under, which then takes its place, on the disk in full. ConfigError
    when the disk refuses; what was there is then as it was."""
    # A random name, since a command may run twice by mistake.
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}_{path.name}")
    try:
        with disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch(exist_ok=False)  # follows no link that has the name
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # safetensors makes files for their owner alone
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write all of them, then put them in place in their order."""
    with contextlib.ExitStack() as files:  # leaves the last one that it entered first
        for name, content in reversed(contents.items()):
            files.enter_context(whole_file(folder / name)).write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_files(path.parent, {path.name: text.encode()})


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    write_text(path, json_text(content, indent) + "\n")


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: it has no NaN and no infinity. Where there was one stands null,
    and the key `not_finite` of an object lists the places."""
    places: list[str] = []
    content = _finite(content, "", places)
    if places and isinstance(content, dict):
        content["not_finite"] = places
    return json.dumps(content, indent=indent, allow_nan=False)


def _finite(value: Any, place: str, places: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place)
        return None
    prefix = f"{place}." if place else ""
    if isinstance(value, dict):
        return {key: _finite(one, f"{prefix}{key}", places) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one, f"{prefix}{i}", places) for i, one in enumerate(value)]
    return value


def remove(path: Path) -> None:
    """Delete a file, a folder with all in it, or a link, which is not followed; nothing where there
    is none. ConfigError where that is not possible."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot delete {path}: {error.strerror}; delete it by hand") from error


def claim_file(path: Path, key: str) -> None:
    """Make the folder of a file to be written later; ConfigError if that will not be possible.
    key: the setting that names the file."""
    require(not path.is_dir(), f"{key} {path} is a folder; name a file")
    claim_folder(path.parent, f"{key} {path}", leftovers_of(path.name))


def leftovers_of(name: str) -> str:
    """The pattern of what killed writers of such a file leave behind."""
    return f"{PARTIAL}????????_{glob.escape(name)}"


def claim_folder(folder: Path, what: str, *leftovers: str) -> None:
    """Make a folder to write into later and remove the files that killed writers left in it, or
    those with the names of `leftovers`. ConfigError if `what` will not be writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for pattern in leftovers or (f"{PARTIAL}*", ".tmp??????"):  # the latter: of safetensors
            for path in folder.glob(pattern):
                if path.is_symlink() or not path.is_dir():
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{what} must be writable: {error.strerror}") from error
