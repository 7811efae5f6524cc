"""Run one rank of a command with a fault in it.

    torchrun ... tools/faults/faulty.py FAULT COMMAND ARGUMENTS...

FAULT is JSON: at the `call`-th call of a `place`, a rank of `ranks` does a `deed`; or it has other
`arguments`, or stands in another folder (`cwd`), from the start. The code of the product knows
nothing of this: functions are replaced from outside, and only in the ranks that are to fail.
"""

import argparse
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "train": "dspark_megatron.train",
    "evaluate": "dspark_megatron.evaluate",
    "store": "prepare_target_cache",
    "export": "convert_checkpoint",
}
"""The modules whose `main` is run."""
MEGATRON = "megatron.core.dist_checkpointing.strategies.filesystem_async"
PLACES = {
    "load": ("dspark_megatron.training.loop:states_source", ""),
    "first batch": ("dspark_megatron.data.batch:MicroBatches.of_step", ""),
    "step": ("dspark_megatron.training.step:GradientStep.run", ""),
    "loss": ("dspark_megatron.training.forward_step:ForwardStep.__call__", ""),
    "save": ("dspark_megatron.training.saves:start_save", ""),
    "save begun": ("dspark_megatron.training.saves:start_save", ""),
    "shards begun": ("dspark_megatron.mcore.checkpoint_writer:PlannedSave.write", ""),
    "file of a checkpoint": (f"{MEGATRON}:FileSystemWriterAsync.write_preloaded_data", ""),
    "shards written": ("dspark_megatron.mcore.checkpoint_writer:PlannedSave.finalize", ""),
    "rename": ("pathlib:Path.rename", r"/iter_\d+'?\)?$"),
    "tracker": ("os:replace", "latest_checkpointed_iteration.txt$"),
    "writer": ("multiprocessing.process:BaseProcess.start", ""),
    "file of a store": ("os:replace", r"/shard_\d+.safetensors$"),
    "decoding": ("dspark_megatron.evaluation.decoding:Decoder.plain", ""),
    "evaluation.json": ("os:replace", "evaluation.json$"),
    "files of an export": ("dspark_megatron.conversion.folder_writer:write_tensor_files", ""),
    "rename of an export": ("pathlib:Path.rename", "/export$"),
}
"""A function, and a pattern that its last argument must have for a call to count."""
AFTER = {
    "save begun",
    "file of a checkpoint",
    "shards written",
    "writer",
    "loss",
    "decoding",
    "files of an export",
}
"""Places where the deed is done when the call is over."""


def everything_of_this_launch() -> list[psutil.Process]:
    """The launcher first: it would end the others in its own way."""
    launcher = psutil.Process(os.getppid())
    others = [one for one in launcher.children(recursive=True) if one.pid != os.getpid()]
    return [launcher, *others]


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_all(*_: Any) -> None:
    for process in everything_of_this_launch():
        process.kill()
    kill()


def kill_launcher(result: Any, *_: Any) -> Any:
    os.kill(os.getppid(), signal.SIGKILL)
    return result


def stop(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_started(result: Any, process: Any) -> Any:
    os.kill(process.pid, signal.SIGKILL)
    return result


def fill_disk(*_: Any) -> None:
    """A limit on file sizes is to a program what a full disk is. Its log stays below."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, resource.RLIM_INFINITY))


def hang(*_: Any) -> None:
    """As a thread does that writes to a file system which does not answer."""
    time.sleep(3600)


def not_a_number(result: Any, *_: Any) -> Any:
    return result * float("nan")


def wait_for_sign(result: Any, *_: Any) -> Any:
    """Say that the place is reached, and go on once somebody says so."""
    Path("reached").touch()
    while not Path("go_on").exists():
        time.sleep(0.05)
    return result


DEEDS: dict[str, Callable[..., Any]] = {
    "kill": kill,
    "kill all": kill_all,
    "kill launcher": kill_launcher,
    "stop": stop,
    "kill started": kill_started,
    "fill disk": fill_disk,
    "hang": hang,
    "not a number": not_a_number,
    "wait": wait_for_sign,
}


def owner_of(function: str) -> tuple[Any, str]:
    """The module or class that has a function of `PLACES`, and its name there."""
    module, _, path = function.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def install(place: str, call: int, deed: Callable[..., Any]) -> None:
    """Replace the function of a place by one that does the deed at its `call`-th call."""
    function, pattern = PLACES[place]
    owner, name = owner_of(function)
    original, left = getattr(owner, name), [call]

    def counted(*args: Any, **kwargs: Any) -> Any:
        last = str(args[-1]) if args else ""
        left[0] -= bool(re.search(pattern, last))
        is_due = left[0] == 0
        left[0] -= is_due  # once
        if is_due and place not in AFTER:
            deed(None, *args)
        result = original(*args, **kwargs)
        return deed(result, *args) if is_due and place in AFTER else result

    setattr(owner, name, counted)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one rank of a command with a fault in it.")
    parser.add_argument("fault", type=json.loads, help="JSON, as tools/faults/table.py makes it")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    fault, command, arguments = asked.fault, asked.command, asked.arguments
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    if int(os.environ.get("RANK", 0)) in fault["ranks"]:
        if folder := fault.get("cwd"):
            os.chdir(folder)
        arguments += fault.get("arguments", [])
        if root := fault.get("root"):
            sys.path.insert(0, str(Path(root).resolve()))
        if place := fault.get("place"):
            prepare(command)
            install(place, fault.get("call", 1), DEEDS[fault["deed"]])
    sys.argv = [command, *arguments]
    sys.exit(importlib.import_module(COMMANDS[command]).main(arguments))


def prepare(command: str) -> None:
    """Import what is to be changed. Megatron-Core can be imported once it is prepared."""
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    if command == "train":
        import dspark_megatron.training.command  # noqa: F401


if __name__ == "__main__":
    main()
