"""Commands of a fault as processes: started, waited for, and told apart from all others."""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from support.training_runs import torchrun

ROOT = Path(__file__).resolve().parents[2]
MARK = "FAULT_RUN"
"""An environment variable that all processes of a fault have, with its folder."""


@dataclass(frozen=True)
class Ended:
    """A command that is over."""

    code: int | None
    """None: it was ended, since it did not end by itself."""
    text: str
    seconds: float


class Command:
    """A Python program under torchrun, or alone with `ranks` None."""

    def __init__(self, folder: Path, program: list[str], ranks: int | None) -> None:
        arguments = program if ranks is None else torchrun(ranks, *program)
        self.folder, self.started = folder, time.monotonic()
        self.log = folder / f"log_{len(list(folder.glob('log_*')))}.txt"
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: str(folder)}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self, limit: float) -> Ended:
        """Wait for its end; after `limit` seconds it is ended with all that it has started."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(limit)
        seconds = time.monotonic() - self.started
        if code is None:
            kill_all_of(self.folder)
            self.process.wait()
        return Ended(code, self.log.read_text(errors="replace"), seconds)


def alive_of(folder: Path) -> list[psutil.Process]:
    """The processes of a fault. Those that are dead and not yet waited for are none."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and (
                process.environ().get(MARK) == str(folder)
            ):
                found.append(process)
    return found


def kill_all_of(folder: Path) -> None:
    while alive := alive_of(folder):
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=10)


def survivors(folder: Path, limit: float) -> tuple[float, list[str]]:
    """How long processes outlive their command, and which are there after `limit` seconds; these
    are killed."""
    started = time.monotonic()
    while (alive := alive_of(folder)) and time.monotonic() - started < limit:
        time.sleep(0.2)
    seconds = time.monotonic() - started
    names = [" ".join(process.cmdline()[1:6]) for process in alive if process.is_running()]
    kill_all_of(folder)
    return seconds, names
