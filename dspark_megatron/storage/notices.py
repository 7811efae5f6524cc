"""What a command mends or cannot check is said once, by the main rank."""

import os
import sys

import torch.distributed as dist

from dspark_megatron.errors import printable

_said: set[str] = set()


def say_once(text: str) -> None:
    """One line on the standard error of the job's first process."""
    if text in _said or _rank() != 0:
        return
    _said.add(text)
    print(printable(text), file=sys.stderr, flush=True)


def _rank() -> int:
    # Files are looked for before there are process groups, too.
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
