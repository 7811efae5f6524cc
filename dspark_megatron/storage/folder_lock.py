"""A lock on a folder, so that one job at a time writes there.

The file in it says whose it is: host, process, and when that process started, since numbers of
processes come again. It is also locked by its owner in the sense of `flock`, which ends with the
owner: two starts at one moment cannot both have it, on one host and wherever the file system
carries such locks.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from dspark_megatron.errors import ConfigError

LOCK = "run.lock"


class FolderTaken(ConfigError):
    """Another process has the lock, or may have it."""


@dataclass(frozen=True)
class Owner:
    host: str
    pid: int
    started: float
    """When the process did, in seconds since 1970."""
    since: str
    """When it took the lock, for the reader."""

    @classmethod
    def this_process(cls) -> "Owner":
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), now)

    def is_alive(self) -> bool:
        """Of an owner on this host."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 2
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class FolderLock:
    """what: the setting that names the folder."""

    def __init__(self, folder: Path, what: str) -> None:
        self.path, self.what = folder / LOCK, f"{what} {folder}"
        self._file: int | None = None
        self._made_folder = self._is_new = False

    def take(self) -> str:
        """Take it, for this process; ConfigError if it is another's. Returns what is to be said of
        an owner that is gone, else nothing."""
        try:
            self._made_folder = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
            return self._taken_over()
        except OSError as error:
            raise ConfigError(f"{self.what} must be writable: {error.strerror}") from error

    def _taken_over(self) -> str:
        """Write this process into the file, if its owner is gone; what is to be said of that."""
        assert self._file is not None
        try:
            said = self._check_owner()
            os.truncate(self._file, 0)
            os.pwrite(self._file, json.dumps(asdict(Owner.this_process())).encode(), 0)
        except BaseException:
            os.close(self._file)
            self._file = None
            raise
        return said

    def release(self) -> None:
        """Also of a lock that was not taken, or is released already."""
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(OSError):
            if _is_at(file, self.path):
                self.path.unlink()
            os.close(file)
        if self._made_folder:
            with contextlib.suppress(OSError):  # it holds something
                self.path.parent.rmdir()

    def _open(self) -> int:
        """The lock's file, which this process alone has locked."""
        while True:
            try:  # one of two starts at the same moment makes it
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                self._is_new = True
            except FileExistsError:
                try:
                    file, self._is_new = os.open(self.path, os.O_RDWR), False
                except FileNotFoundError:  # its owner has just released it
                    continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _read(file)
                os.close(file)
                raise self._taken(owner) from None
            except OSError:  # a file system without such locks: what the file says must do
                return file
            if _is_at(file, self.path):
                return file
            os.close(file)  # its owner has just released it

    def _check_owner(self) -> str:
        assert self._file is not None
        owner = _read(self._file)
        if owner is None and not self._is_new:  # another host may be about to write it
            time.sleep(1)
            owner = _read(self._file)
        if owner is None:
            return ""
        if owner.host != socket.gethostname():
            raise FolderTaken(
                f"{self.what} is in use by {owner}: that is another host, and from here it cannot "
                f"be seen whether the process is alive. Wait for it, stop it, or, if it is gone, "
                f"delete {self.path} and start again"
            )
        if owner.is_alive():
            raise self._taken(owner)
        return f"{self.what} was in use by {owner}, which is gone: taken over"

    def _taken(self, owner: Owner | None) -> FolderTaken:
        return FolderTaken(
            f"{self.what} is in use by {owner or 'another process'}, which is alive; wait until it "
            "has ended, stop it, or name another folder"
        )


def _read(file: int) -> Owner | None:
    """None where nothing is written yet, or what it is cannot be known."""
    try:
        return Owner(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False
