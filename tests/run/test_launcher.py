"""A rank ends with the torchrun that started it; a plain start survives its shell."""

import os
import subprocess
import sys
import time

import psutil
import pytest

RANK = """
import os, sys, time
from dspark_megatron.run.ranks.ending import at_end
from dspark_megatron.run.ranks.launcher import end_with_launcher
end_with_launcher()
with at_end(lambda: os.path.exists(sys.argv[1]) and os.unlink(sys.argv[1])):
    open(sys.argv[1], "w").close()
    print(os.getpid(), flush=True)
    time.sleep(600)
"""
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()
"""


def started(file, **environment):
    """A launcher, and the rank that it has started."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, "-c", RANK, str(file)],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    return launcher, psutil.Process(int(launcher.stdout.readline()))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_end_with_their_launcher_and_leave_no_lock(tmp_path, rank):
    mark = {"TORCHELASTIC_RUN_ID": "x", "RANK": rank, "LOCAL_RANK": rank}
    launcher, process = started(tmp_path / "held", **mark)
    launcher.kill()
    process.wait(30)
    said = launcher.communicate()[1]
    assert not (tmp_path / "held").exists()
    assert ("the launcher is gone (torchrun, process" in said) == (rank == "0"), "one line a node"


def test_a_plain_start_goes_on_without_its_shell(tmp_path):
    launcher, process = started(tmp_path / "held")
    launcher.kill()
    launcher.wait()
    time.sleep(3)  # three looks at the parent
    assert process.is_running() and (tmp_path / "held").exists()
    process.kill()
