"""What ends a run before its last iteration, and never in the middle of a step."""

import contextlib
import enum
import signal
import time
from collections.abc import Iterator


class StopReason(enum.IntEnum):
    """Ordered: of the reasons of all ranks the largest is the one told."""

    NONE = 0
    EXIT_DURATION = 1
    SIGNAL = 2


class StopRequests:
    """The signals and the age of this process."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.started = time.monotonic()

    def reason(self, exit_duration_minutes: float | None) -> StopReason:
        """Why this rank would stop now; ranks may differ."""
        if self.signals:
            return StopReason.SIGNAL
        minutes = (time.monotonic() - self.started) / 60
        if exit_duration_minutes is not None and minutes >= exit_duration_minutes:
            return StopReason.EXIT_DURATION
        return StopReason.NONE


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Collect SIGTERM and SIGINT instead of dying, so that a step can end and be saved."""
    requests = StopRequests()
    names = (signal.SIGTERM, signal.SIGINT)
    before = {
        name: signal.signal(name, lambda number, _: requests.signals.append(number))
        for name in names
    }
    try:
        yield requests
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
