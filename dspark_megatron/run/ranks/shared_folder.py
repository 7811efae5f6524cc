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
