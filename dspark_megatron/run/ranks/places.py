"""Where this process is in its run: what it says of itself, and what its main thread is seen to do.

A rank that hangs cannot say so. Its watching thread tells the others where it is, so that they can
name it when it does not come.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import dspark_megatron

_PACKAGE = Path(dspark_megatron.__file__).parent
_COLLECTIVES = ("distributed_c10d.py", "_functional_collectives.py")
_LONGER = 6
"""How many times the limit a rank may wait while others load."""


@dataclass
class _Here:
    text: str = "its start"
    longer: bool = True
    marks: int = 0
    """How often the place has changed."""
    minutes: float = 10.0


_here = _Here()


def at(text: str, *, longer: bool = False) -> None:
    """From now on this rank is at `text`. longer: others may load meanwhile."""
    _here.text, _here.longer = text, longer
    _here.marks += 1


def set_time_limit(minutes: float) -> None:
    """How long ranks may wait for each other (train.timeout_minutes)."""
    _here.minutes = minutes


def time_limit(*, longer: bool | None = None) -> float:
    """Seconds; by default at this place."""
    longer = _here.longer if longer is None else longer
    return 60 * _here.minutes * (_LONGER if longer else 1)


@dataclass(frozen=True)
class Seen:
    """The main thread at one moment."""

    text: str
    marks: int
    line: str
    """Of ours, the innermost."""
    collective: str
    """That it waits in; empty if in none."""
    stack: tuple[tuple[int, int], ...]
    """The same as long as the thread is inside the same call."""


def look(thread: int) -> Seen:
    """At the main thread, which is `thread`."""
    frames = _frames(sys._current_frames().get(thread))
    ours = (_line(frame) for frame in frames)
    collectives = (
        frame.f_code.co_name
        for frame in reversed(frames)
        if frame.f_code.co_filename.endswith(_COLLECTIVES)
    )
    return Seen(
        text=_here.text,
        marks=_here.marks,
        line=next(filter(None, ours), ""),
        collective=next(collectives, ""),
        stack=tuple((id(frame.f_code), frame.f_lasti) for frame in frames),
    )


def _frames(frame: FrameType | None) -> list[FrameType]:
    """The innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _line(frame: FrameType) -> str:
    """Of our own code, as path:line in function; empty for others'."""
    file = Path(frame.f_code.co_filename)
    if _PACKAGE not in file.parents:
        return ""
    return f"{file.relative_to(_PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}"
