"""How long the parts of a step take, without waiting for the device."""

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch


class _HostMoment:
    """What a CUDA event is on a GPU: a moment that can be compared with a later one."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_HostMoment") -> float:
        return 1000 * (end.at - self.at)


class StepParts:
    """Seconds by part. On a GPU its own time between CUDA events, which are read once they have
    passed; elsewhere the host's. A part within another one is counted by itself alone."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._name: str | None = None
        self._marks: deque[tuple[Any, str | None]] = deque()
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs within is of this part."""
        before = self._name
        self._mark(name)
        try:
            yield
        finally:
            self._mark(before)

    def seconds(self) -> dict[str, float]:
        """By part, since this was last asked; what the device has not yet done comes next time."""
        self._add_passed()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _mark(self, name: str | None) -> None:
        """From here on it is this part."""
        self._name = name
        self._marks.append((self._moment(), name))
        self._add_passed()

    def _moment(self) -> Any:
        if not self._on_gpu:
            return _HostMoment()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_passed(self) -> None:
        while len(self._marks) > 1 and self._marks[1][0].query():
            start, name = self._marks.popleft()
            if name is not None:
                self._seconds[name] += start.elapsed_time(self._marks[0][0]) / 1000
