"""Opens files of data, also compressed ones. The first bytes tell what a file is."""

import bz2
import gzip
import importlib
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from dspark_megatron.errors import ConfigError, require

INSTALL = "pip install pyarrow datasets"
"""What the extra `data` has: packages that only some forms of data need."""
ZIP = b"PK\x03\x04"


def needed(module: str, what: str) -> ModuleType:
    """A module of the extra. ConfigError, with the command that installs it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{what} needs the package {module.partition('.')[0]}, which cannot be imported "
            f"({error}); install it: {INSTALL}"
        ) from error


def _open_zstandard(path: str | Path, mode: str) -> BinaryIO:
    """By pyarrow, which tells a file that was cut short from a whole one."""
    pyarrow = needed("pyarrow", f"{path} is compressed by Zstandard, which")
    return io.BufferedReader(pyarrow.CompressedInputStream(open(path, mode), "zstd"))


OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstandard,
    # Before it may stand frames to be skipped: pzstd writes the size of the next one there.
    **{bytes([0x50 + i]) + b"\x2a\x4d\x18": _open_zstandard for i in range(16)},
}
"""How to open compressed files, by their first bytes."""


def open_packed(path: str | Path) -> BinaryIO:
    """The content of a file, unpacked while it is read. ConfigError or OSError."""
    start = first_bytes(path)
    require(
        not start.startswith(ZIP),
        f"{path} is a ZIP archive, and lines of JSON are read; unpack it: unzip FILE",
    )
    fitting = (opener for magic, opener in OPENERS.items() if start.startswith(magic))
    return next(fitting, open)(path, "rb")


def first_bytes(path: str | Path) -> bytes:
    """By which a file's form is told. ConfigError for what is no file, OSError where it cannot be
    read."""
    require(
        Path(path).is_file() or not Path(path).exists(),
        f"cannot read {path}: it is a folder, pipe or device, not a file",
    )
    with open(path, "rb") as file:
        return file.read(8)


@contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    """Turns an OSError into a ConfigError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def damaged(path: str | Path, error: object, last: str = "") -> ConfigError:
    """last: what was still read, such as `line 7`."""
    after = f" after {last}" if last else ""
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return ConfigError(f"{path} is damaged or cut short{after}: {reason}; copy it again")
