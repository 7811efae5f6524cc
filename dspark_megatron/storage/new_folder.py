"""A folder that appears whole, by a rename, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dspark_megatron.errors import ConfigError, require


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `output`, an absolute path. When
    filling it fails, nothing of it is left and `output` is as it was.

    Raises ConfigError, at the beginning, when `output` could not be written.
    """
    scratch = _scratch(output)
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        try:
            _replace(output, new, old)
        except OSError as error:
            raise ConfigError(
                f"cannot put {output} in place: {error.strerror}; choose another folder"
            ) from error
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):  # it stays only if it holds what could not be put back
            scratch.rmdir()


def _scratch(output: Path) -> Path:
    """A folder beside output, of a name that nobody else has."""
    require(
        not os.path.ismount(output),
        f"{output} is a mount point, which a folder cannot take the place of; choose one in it",
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from error


def _replace(output: Path, new: Path, old: Path) -> None:
    if output.exists():
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
