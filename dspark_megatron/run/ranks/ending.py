"""How a rank ends that cannot unwind, since a thread of it is inside a collective for ever."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

from dspark_megatron.errors import FAILED, printable

_last_calls: list[Callable[[], None]] = []


@contextlib.contextmanager
def at_end(call: Callable[[], None]) -> Iterator[None]:
    """Call it when the block is left, and when the process ends within it by `end_process`. It may
    be called twice."""
    _last_calls.append(call)
    try:
        yield
    finally:
        _last_calls.remove(call)
        call()


def end_process(message: str = "", code: int = FAILED) -> None:
    """End with this exit code, whatever the other threads do."""
    if message:
        say(message)
    for call in reversed(_last_calls):
        with contextlib.suppress(Exception):
            call()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def say(message: str) -> None:
    """Print an error, on a line of its own: this rank or another may have a progress bar."""
    tqdm = sys.modules.get("tqdm")
    may_have = os.environ.get("WORLD_SIZE", "1") != "1" or (tqdm and tqdm.tqdm._instances)
    has_bar = may_have and sys.stderr.isatty()
    with contextlib.suppress(OSError):  # who read it may be gone
        print(f"{chr(10) * bool(has_bar)}{printable(message)}", file=sys.stderr, flush=True)


def tell_torchrun(rank: int) -> None:
    """Let torchrun's own report, which comes after ours, name this rank as the first to fail."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text, second = f"see what rank {rank} says above", str(int(time.time()) - 1)
        extra = {"py_callstack": text, "timestamp": second}
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as opened:
            json.dump({"message": {"message": text, "extraInfo": extra}}, opened)
