"""A rank ends with the torchrun that started it. Imports nothing heavy: loading takes a while, and
a launcher may be killed meanwhile."""

import os
import threading
import time

from dspark_megatron.run.ranks.ending import end_process

_CHECK_SECONDS = 1.0
_launchers: list[int] = []
"""The process that started this one; empty where that is not torchrun."""


def end_with_launcher() -> None:
    """Watch the parent process from now on, if it is torchrun's. A plain start has none, and goes
    on when its shell is gone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _launchers[:] = [os.getppid()]
        threading.Thread(target=_watch, daemon=True).start()


def launcher_is_gone() -> bool:
    return bool(_launchers) and os.getppid() not in _launchers  # an orphan has another parent


def _watch() -> None:
    while not launcher_is_gone():
        time.sleep(_CHECK_SECONDS)
    is_first = os.environ.get("LOCAL_RANK") == "0"  # one line a node
    end_process(
        f"error: the launcher is gone (torchrun, process {_launchers[0]}), so its ranks end. Start "
        "the run again to continue it"
        if is_first
        else ""
    )
