"""Whether a folder that all ranks write into is one and the same folder for all of them."""

import contextlib
import secrets
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dspark_megatron.errors import require
from dspark_megatron.run.ranks.places import at
from dspark_megatron.run.ranks.runtime import Runtime, from_main_rank
from dspark_megatron.storage.writing import PARTIAL, disk_named

_LATE_SECONDS = 30.0
"""How long a network file system may take to show a new file."""


def check_shared(what: str, *folders: Path, runtime: Runtime) -> None:
    """ConfigError on every rank unless each of them reads, in these folders, a file that the main
    rank writes there, and may write there itself. A broadcast and an all-gather of objects."""
    if runtime.world_size == 1:
        return
    at(f"looking whether {what} is shared", longer=True)
    token = secrets.token_hex(16)
    # A name that no node can remember not to have found.
    token = from_main_rank(token)
    files = [folder / f"{PARTIAL}{token[:8]}_shared" for folder in folders]
    try:
        if runtime.is_main:
            for file in files:
                with disk_named(file):
                    file.write_text(token, encoding="utf-8")
        dist.barrier()
        problem = next(filter(None, (_problem(file, token) for file in files)), "")
        problems: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(problems, problem and f"rank {runtime.rank} ({_host()}) {problem}")
    finally:
        if runtime.is_main:
            for file in files:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
    found = list(filter(None, problems))
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    require(
        not found,
        f"{what} must be one folder on a file system that all nodes share, and writable from all: "
        f"{'; '.join(found[:4])}{more}. Name a folder that all nodes share, by its full path",
    )


def _problem(file: Path, token: str) -> str:
    """What is wrong with the main rank's file as this rank sees it; empty where nothing is."""
    deadline = time.monotonic() + _LATE_SECONDS
    while _text(file) != token:
        if time.monotonic() > deadline:
            return f"does not see in {file.parent.absolute()} what the main rank wrote there"
        time.sleep(0.1)
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        return f"cannot write in {file.parent.absolute()} ({error.strerror})"
    return ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _host() -> str:
    return socket.gethostname()


def who_writes(folder: Path, runtime: Runtime) -> int:
    """The rank that writes what this rank reads in a folder: the main rank where both see the same
    folder, else the first rank of this host, else this rank. Of two ranks that see one folder each
    may be told to write, if a file of the other shows late. A broadcast and an
    all-gather of objects and two barriers; every rank calls it."""
    if runtime.world_size == 1:
        return 0
    at(f"looking who writes in {folder}", longer=True)
    token = from_main_rank(secrets.token_hex(4))
    hosts: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(hosts, _host())
    first = hosts.index(hosts[runtime.rank])
    files = {rank: folder / f"{PARTIAL}{token}_{rank}" for rank in (0, first, runtime.rank)}
    mine = files[runtime.rank]
    try:
        if first == runtime.rank:
            with contextlib.suppress(OSError):  # who may not write has another one do it
                folder.mkdir(parents=True, exist_ok=True)
                mine.touch()
        dist.barrier()
        seen = [rank for rank in (0, first) if files[rank].exists()]
        dist.barrier()
    finally:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)
    return seen[0] if seen else runtime.rank
