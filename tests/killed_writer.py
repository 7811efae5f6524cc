"""Write a cache in processes that are killed at random points; run by a test.

    python tests/killed_writer.py KILLS SHARDS ARGUMENTS...

ARGUMENTS are those of tools/prepare_target_cache.py, whose cache has SHARDS shards. Each job is
forked from this process, which has paid for the imports, and ended by SIGKILL some random
milliseconds after a random number of shards is there, of the first half: a busy machine must not let
it finish before. A last job is left alone.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import prepare_target_cache  # noqa: E402

from dspark_megatron.training.runtime import prepare_megatron  # noqa: E402


def start(arguments: list[str]) -> int:
    child = os.fork()
    if not child:
        os.nice(10)  # behind the process that is to end it in time
        prepare_target_cache.main(arguments)
        os._exit(0)
    return child


def main() -> None:
    kills, shards, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    prepare_megatron()
    import dspark_megatron.training.loop  # noqa: F401

    folder = Path(arguments[arguments.index("--output") + 1])
    for wanted in sorted(random.sample(range(shards // 2), kills)):
        child = start(arguments)
        while not os.waitpid(child, os.WNOHANG)[0]:
            if folder.is_dir() and len(list(folder.glob("shard_*"))) >= wanted:
                time.sleep(random.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                print("killed" if os.WIFSIGNALED(status) else "over", flush=True)
                break
        else:
            sys.exit("a job ended by itself")
    _, status = os.waitpid(start(arguments), 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
