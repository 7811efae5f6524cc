"""Write a cache in processes that are killed at random points; run by a test.

    python tests/support/killed_writer.py KILLS ARGUMENTS...

ARGUMENTS are those of tools/prepare_target_cache.py. Each job is forked from this process, which
has paid for the imports, and ends by SIGKILL when it is about to flush or rename a file for a
random number of times: an unfinished file lies there, or a finished one under its other name. A
last job is left alone.
"""

import os
import random
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import prepare_target_cache  # noqa: E402

from dspark_megatron.mcore.prepare import prepare_megatron  # noqa: E402

MOST_CALLS = 40


def job(arguments: list[str], calls: int | None) -> int:
    """Its exit status; calls: so many go well, and at the next it is killed."""
    child = os.fork()
    if not child:
        if calls is not None:
            end_after(calls)
        prepare_target_cache.main(arguments)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def end_after(calls: int) -> None:
    left = iter(range(calls))

    def ending(call):
        def counted(*args):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return counted

    os.fsync, os.replace = ending(os.fsync), ending(os.replace)


def main() -> None:
    kills, arguments = int(sys.argv[1]), sys.argv[2:]
    prepare_megatron()
    import dspark_megatron.training.loop  # noqa: F401

    for _ in range(kills):
        status = job(arguments, random.randrange(MOST_CALLS))
        print("killed" if os.WIFSIGNALED(status) else "over", flush=True)
    sys.exit(os.waitstatus_to_exitcode(job(arguments, None)))


if __name__ == "__main__":
    main()
