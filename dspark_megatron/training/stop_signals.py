"""A stop signal ends a run after its step, not in the middle of one."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying, so that a step can end and be saved."""
    received: list[int] = []
    names = (signal.SIGTERM, signal.SIGINT)
    before = {
        name: signal.signal(name, lambda number, _: received.append(number)) for name in names
    }
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
