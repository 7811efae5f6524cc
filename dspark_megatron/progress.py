"""How far a long piece of work is: a bar on a terminal, plain lines in a log file."""

import os
import sys
import time

from tqdm import tqdm

from dspark_megatron.errors import printable

EVERY = 30.0
"""Seconds between the plain lines of one piece of work."""


def has_bar() -> bool:
    """Whether this job shows bars: only on a terminal, and only where all ranks are on one node."""
    world = os.environ.get("WORLD_SIZE", "1")
    return sys.stderr.isatty() and os.environ.get("LOCAL_WORLD_SIZE", world) == world


def say(text: str) -> None:
    """Print a line on stdout, above the bar if there is one."""
    tqdm.write(printable(text))
    sys.stdout.flush()


class Progress:
    """A bar, or a line every 30 seconds and one at the end, on stderr."""

    def __init__(
        self,
        total: int,
        name: str,
        unit: str,
        *,
        done: int = 0,
        show: bool = True,
        scale: bool = False,
        own_lines: bool = False,
    ) -> None:
        """show: on one rank only. scale: large numbers are shown as 1.5M. own_lines: without a bar
        the caller prints its lines by `line`, and there are no others."""
        self.name, self.total, self.done = name, total, done
        self._unit, self._scale, self._note = unit, scale, ""
        self._speaks = show and not own_lines and not has_bar()
        self._start = self._spoken = time.monotonic()
        self.has_bar = show and has_bar()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=unit,
            unit_scale=scale,
            disable=not self.has_bar,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rename(self, name: str) -> None:
        self.name = name
        self._bar.set_description(name, refresh=False)

    def note(self, text: str) -> None:
        """What is shown behind the numbers from now on."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def update(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        self._bar.update(count)
        if self._speaks and time.monotonic() - self._spoken >= EVERY:
            self._speak()

    def line(self, text: str) -> None:
        """A plain line on stderr, where there is no bar. TQDM_DISABLE, which `--quiet` sets, keeps
        it to itself."""
        if not self.has_bar and not os.environ.get("TQDM_DISABLE"):
            sys.stdout.flush()  # both may be one file
            print(printable(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
        if self._speaks:
            self._speak()
            self._speaks = False

    def _speak(self) -> None:
        self._spoken = time.monotonic()
        done, total = (tqdm.format_sizeof(n) if self._scale else n for n in (self.done, self.total))
        note = f"  {self._note}" if self._note else ""
        passed = describe_seconds(self._spoken - self._start)
        self.line(f"{self.name}: {done}/{total} {self._unit} in {passed}{note}")


def describe_seconds(seconds: float) -> str:
    """In the unit in which the number is easy to read: 12 s, 34 min, 9 h, 3 days."""
    for size, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if seconds < {1: 100, 60: 6000, 3600: 172_800}[size]:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
