"""The ranks of this node, started by torchrun's machinery and ended in order.

torchrun itself kills ranks 30 seconds after a signal, and ends with a traceback of its own. Here a
signal is passed on and the ranks take the time that they need; they say themselves what went wrong,
and only a rank that was killed is spoken for.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dspark_megatron.cli.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED
from dspark_megatron.cli.train.launching import Placement
from dspark_megatron.errors import ConfigError, printable

_JOIN_MINUTES = 10
_STAY_SECONDS = 3.0
"""Node 0 stays so long after a failure, since the other nodes look every second what it was."""


def start_ranks(words: list[str], placed: Placement, stop_text: str) -> int:
    """Start `dspark WORDS` on every rank of this node and wait for all; returns the exit code."""
    if placed.processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the cores are shared
    if placed.nodes > 1:
        os.environ.setdefault("NCCL_DEBUG", "WARN")  # a failing NCCL says why
        say(
            f"node {placed.node_rank} of {placed.nodes} waits at {placed.rendezvous} for the "
            f"others, for at most {_JOIN_MINUTES} minutes"
        )
    logging.disable(logging.CRITICAL)  # torchrun's words about what the ranks have said
    program = ["-u", "-m", "dspark_megatron.cli.main", *words]
    stops = Stops(stop_text)
    with tempfile.TemporaryDirectory(prefix="dspark_") as folder, stops.heeded():
        try:
            _wait_for_first_node(placed)
            elastic_launch(_launch_config(placed, folder), sys.executable)(*program)
        except ChildFailedError as error:
            if placed.nodes > 1 and placed.node_rank == 0:
                time.sleep(_STAY_SECONDS)  # while `error` lives, so does the store that it served
            return exit_code(error.failures, stop_asked=stops.asked)
        except KeyboardInterrupt:
            return INTERRUPTED
        except RendezvousError as error:
            raise ConfigError(
                f"the {placed.nodes} nodes did not meet at {placed.rendezvous or 'localhost'} "
                f"({error or type(error).__name__}); see that node 0 is the host it names, that "
                "its port is free and reached from all, and start the same command on each node"
            ) from error
    return DONE


def _wait_for_first_node(placed: Placement) -> None:
    """Until it answers or the time is over, which PyTorch then says. PyTorch itself waits a minute
    for it, and no signal is heeded meanwhile."""
    if placed.node_rank == 0:
        return
    host, _, port = placed.rendezvous.rpartition(":")
    until = time.monotonic() + 60 * _JOIN_MINUTES
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        time.sleep(1)


def _launch_config(placed: Placement, folder: str) -> LaunchConfig:
    meeting = {"join_timeout": 60 * _JOIN_MINUTES, "is_host": placed.node_rank == 0}
    return LaunchConfig(
        min_nodes=placed.nodes,
        max_nodes=placed.nodes,
        nproc_per_node=placed.processes,
        run_id="dspark" if placed.rendezvous else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=placed.rendezvous or "localhost:0",
        rdzv_configs=meeting,
        local_addr=placed.node_address,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        signals_to_handle="SIGQUIT",  # the others are heeded here
    )


class Stops:
    """Signals to this process, and what the ranks are told then."""

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, False

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
            numbers.remove(signal.SIGHUP)
        before = {number: signal.signal(number, self._heed) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        """The first one is passed on; a second Ctrl-C ends all ranks at once, each with what it has
        started: a rank leads a session of its own."""
        ranks = psutil.Process().children()
        if not ranks:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True
            say(self.text)
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGTERM)
        elif number == signal.SIGINT:  # others may be sent twice by who wants one stop
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
            raise KeyboardInterrupt


def exit_code(failures: dict[int, ProcessFailure], *, stop_asked: bool) -> int:
    """Of ranks of which some have not ended well. Says which one was killed, if one was."""
    first_rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    if first.exitcode >= 0:
        is_known = first.exitcode in (BAD_INPUT, INTERRUPTED)
        return first.exitcode if is_known else FAILED
    if stop_asked and first.exitcode == -signal.SIGTERM:  # it was still starting
        return INTERRUPTED
    number = -first.exitcode
    often = ", often because host memory ran out (see dmesg)" if number == signal.SIGKILL else ""
    say(
        f"error: rank {first_rank} was killed by signal {number} "
        f"({signal.Signals(number).name}){often}; start the same command again to go on"
    )
    return FAILED


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(printable(text), file=sys.stderr, flush=True)
