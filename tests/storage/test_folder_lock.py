"""One job at a time writes into a folder, and a lock whose owner is gone stops nobody there."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.folder_lock import LOCK, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from dspark_megatron.storage.folder_lock import FolderLock
FolderLock(Path(sys.argv[1]), "train.output_dir").take()
print("taken", flush=True)
time.sleep(600)
"""


def lock(folder):
    return FolderLock(folder, "train.output_dir")


@pytest.fixture
def other(tmp_path):
    """Another process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()


def left_by(folder, **changes):
    """A lock as a killed process leaves it."""
    here = psutil.Process()
    owner = {
        "host": os.uname().nodename,
        "pid": here.pid,
        "started": here.create_time(),
        "since": "2026-01-02 03:04:05",
    }
    (folder / LOCK).write_text(json.dumps(owner | changes))


def test_a_second_process_is_refused_and_named_the_first(other, tmp_path):
    before = (tmp_path / LOCK).read_text()
    with pytest.raises(ConfigError, match=f"in use by process {other.pid} on .*, which is alive"):
        lock(tmp_path).take()
    assert (tmp_path / LOCK).read_text() == before


def test_the_lock_of_a_killed_process_is_taken_over_with_a_message(other, tmp_path):
    other.send_signal(signal.SIGKILL)
    other.wait()
    mine = lock(tmp_path)
    assert f"in use by process {other.pid} on " in (said := mine.take()) and "taken over" in said
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_process_of_the_same_number_that_started_later_is_another(tmp_path):
    left_by(tmp_path, started=1.0)
    assert "taken over" in lock(tmp_path).take()


def test_where_the_file_system_knows_no_locks_the_process_itself_is_looked_at(tmp_path):
    left_by(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on .*, which is alive"):
        lock(tmp_path).take()


def test_another_hosts_lock_is_refused_with_the_file_to_delete(tmp_path):
    left_by(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(
        ConfigError, match=f"on elsewhere.* if it is gone, delete {tmp_path / LOCK}"
    ):
        lock(tmp_path).take()
    (tmp_path / LOCK).unlink()
    assert lock(tmp_path).take() == ""


def test_it_is_free_again_after_its_release_and_can_be_released_twice(tmp_path):
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        first = lock(folder)
        assert first.take() == ""
        with pytest.raises(ConfigError, match="which is alive"):
            lock(folder).take()
        first.release()
        first.release()
    assert not folder.exists(), "an empty folder that it has made goes with it"


def test_one_process_of_many_that_start_at_once_has_it(tmp_path):
    left_by(tmp_path, started=1.0)
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(4)
    ]
    said = []
    for process in starts:
        said.append(process.stdout.readline())
        if said[-1]:
            holder = process
    assert sorted(said) == ["", "", "", "taken\n"]
    holder.kill()
    for process in starts:
        process.wait()


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="train.output_dir .*file must be writable"):
        lock(tmp_path / "file").take()
