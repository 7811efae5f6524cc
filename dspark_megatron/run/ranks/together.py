"""Work of some ranks, however long, that the others wait for and end with."""

import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from dspark_megatron.errors import ConfigError
from dspark_megatron.run.ranks.places import at

_SECONDS = 10.0
"""Of work between two meetings of all ranks: a collective may not take for ever."""


def finish_together(work: Iterator[None] | None, place: str) -> None:
    """Go through the steps of this rank's work, if it has any, until those of all ranks are done.
    ConfigError on every rank where one raises it. Every ten seconds, and once at the end, an
    all-gather of an object over the world."""
    is_done = work is None
    while True:
        at(place, longer=True)
        problem = ""
        try:
            is_done = is_done or _is_done(work)
        except ConfigError as error:
            problem = str(error)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (is_done, problem))
        if found := [said for _, said in everyone if said]:
            _end(work)
            raise ConfigError(found[0])
        if all(done for done, _ in everyone):
            return


def _is_done(work: Iterator[None] | None) -> bool:
    """Whether the work came to its end, within the seconds."""
    assert work is not None, "nothing is done"
    until = time.monotonic() + _SECONDS
    return not any(time.monotonic() > until for _ in work)


def _end(work: Any) -> None:
    """Let a generator clear up."""
    if hasattr(work, "close"):
        work.close()
