"""A folder that appears whole or not at all, in the place of an earlier one.

It is filled in a scratch folder beside its place, `.NAME.????????/new`; what it replaces goes to
`old` there. Who fills one holds a lock on its scratch folder, so the next writer of the same folder
knows which of them killed writers have left.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.notices import say_once


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `output`, an absolute path. If filling
    it fails, nothing of it is left and `output` is as it was. ConfigError, before there is anything
    to fill, when `output` could not be written. What killed writers of the same folder left goes
    first."""
    require(
        not os.path.ismount(output),
        f"{output} is a mount point, which a folder cannot take the place of; choose one in it",
    )
    with contextlib.ExitStack() as held:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            clear_scratch(output)
            scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
            with contextlib.suppress(OSError):  # of a file system without locks
                held.enter_context(_lock(scratch))
            new, old = scratch / "new", scratch / "old"
            new.mkdir()
        except OSError as error:
            raise ConfigError(f"cannot write {output}: {error.strerror}") from error
        try:
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
            with contextlib.suppress(OSError):  # it stays if it holds what could not be put back
                scratch.rmdir()


def clear_scratch(output: Path) -> None:
    """Remove the scratch folders that killed writers of a folder have left beside it. One that was
    killed between the two renames has the earlier folder, which gets its place back."""
    name = re.compile(rf"\.{re.escape(output.name)}\.[a-z0-9_]{{8}}")
    for scratch in output.parent.iterdir():
        if not name.fullmatch(scratch.name) or scratch.is_symlink() or not scratch.is_dir():
            continue
        if {path.name for path in scratch.iterdir()} - {"new", "old"}:
            continue  # somebody else's
        with contextlib.suppress(OSError), _lock(scratch):  # or it cannot be known whose it is
            old = scratch / "old"
            if old.is_dir() and not os.path.lexists(output):
                old.rename(output)
                say_once(f"{output} was put back: its writer was killed while it replaced it")
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """OSError while another process holds it; it ends with the process."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


def _replace(output: Path, new: Path, old: Path) -> None:
    if output.exists():
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
