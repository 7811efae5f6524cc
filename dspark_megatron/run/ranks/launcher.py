"""A rank ends with the torchrun that started it. Imports nothing heavy: loading takes a while, and
a launcher may be killed meanwhile."""

import os
import threading
import time

from dspark_megatron.run.ranks.ending import end_process

_CHECK_SECONDS = 1.0


def end_with_launcher() -> None:
    """Watch the parent process from now on, if it is torchrun's. A plain start has none, and goes
    on when its shell is gone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:  # an orphan is given another parent
        time.sleep(_CHECK_SECONDS)
    rank = os.environ.get("RANK", "?")
    end_process(
        f"error: rank {rank} ends, since its launcher is gone (torchrun, process {launcher}); "
        "start the run again to continue it"
    )
