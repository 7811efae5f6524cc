"""Commands that start their ranks: how they begin, stop, fail and end. Few starts, much asked."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dspark_megatron.cli.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED
from dspark_megatron.cli.main import main
from dspark_megatron.cli.train.launching import is_rank, placement
from dspark_megatron.cli.train.ranks import exit_code
from dspark_megatron.errors import ConfigError
from support.paths import ROOT
from support.training_runs import curve_lines, latest, status, write_config

NOTHING = dict(
    as_rank=False, gpus=None, nodes=None, node_rank=None, rendezvous=None, node_address=None
)


def options(**given):
    return Namespace(**{**NOTHING, "dry_run": False, **given})


class Command:
    """`dspark WORDS` in a process group of its own, as a terminal starts it."""

    def __init__(self, folder, *words):
        def heed_interrupts():  # a shell's background job, in which tests may run, ignores them
            signal.signal(signal.SIGINT, signal.default_int_handler)

        self.files = folder / "stdout", folder / "stderr"
        out, err = (file.open("w") for file in self.files)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dspark_megatron.cli.main", *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            preexec_fn=heed_interrupts,
            stdout=out,
            stderr=err,
        )
        self.ranks = []

    def wait_for_steps(self, output, count):
        lines = output / "metrics.jsonl"
        deadline = time.monotonic() + 900
        while not lines.exists() or len(curve_lines(output)) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.01)
        self.ranks = psutil.Process(self.process.pid).children()

    def wait_for_text(self, text):
        deadline = time.monotonic() + 900
        while text not in self.text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.01)

    def end(self):
        """The exit code, once every rank has ended, too."""
        code = self.process.wait(240)
        _, alive = psutil.wait_procs(self.ranks, timeout=120)
        assert not alive
        return code

    def text(self):
        return "".join(file.read_text() for file in self.files)


@pytest.fixture
def run_of(tiny_run, tmp_path):
    output = tmp_path / "run"
    train = {"output_dir": str(output), "iterations": 100000, "save_every": 1000, "log_every": 1}
    return write_config(tmp_path, tiny_run, train=train), output


@pytest.mark.commands
def test_stopped_by_ctrl_c_then_killed_then_complete(run_of, tmp_path, capsys):
    """Three starts in one folder, and a fourth that has nothing to do."""
    config, output = run_of
    first = Command(tmp_path, "train", config, "--processes", 2, "--json")
    first.wait_for_steps(output, 2)
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.end() == DONE, first.text()
    stopped_at = latest(output)
    assert stopped_at >= 2
    assert json.loads(first.files[0].read_text()) == {
        "output_dir": str(output),
        "run_status": "stopped",
        "iteration": stopped_at,
        "checkpoint": str(output / "checkpoints" / f"iter_{stopped_at:07d}"),
    }
    assert "Traceback" not in first.text() and first.text().count("stopping: ") == 1

    second = Command(tmp_path, "train", config, "--processes", 2, "--quiet")
    second.wait_for_steps(output, stopped_at + 1)
    second.ranks[1].kill()
    assert second.end() == FAILED
    text = second.files[1].read_text()
    assert text.count("error: rank 1 was killed by signal 9 (SIGKILL)") == 1
    assert "Traceback" not in text and "ETA" not in text
    assert second.files[0].read_text() == ""

    length = f"train.iterations={stopped_at + 1}"
    third = Command(tmp_path, "train", config, length, "--quiet")
    assert third.end() == DONE
    assert third.text() == "", "Megatron-Core, too, has nothing to say"
    assert status(output) == "completed\n" and latest(output) == stopped_at + 1
    started = psutil.Process().children(recursive=True)
    assert main(["train", str(config), length]) == DONE
    said = capsys.readouterr().out
    assert f"nothing is left to do: the run is at iteration {stopped_at + 1:,}" in said
    assert f"dspark evaluate {output}" in said
    assert psutil.Process().children(recursive=True) == started


@pytest.mark.commands
def test_nodes_that_differ_end_with_one_sentence_each(run_of, tmp_path):
    """Node 1 waits for node 0, and no stack trace follows when that one is gone first."""
    config, _ = run_of
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"localhost:{free.getsockname()[1]}"
    nodes = []
    for rank in (1, 0):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        words = ["--nodes", 2, "--node-rank", rank, "--rendezvous", meeting, "--processes", 1]
        nodes.append(Command(folder, "train", config, *words, f"optimizer.lr=0.00{rank + 1}"))
    for node in nodes:
        assert node.end() == BAD_INPUT, node.text()
        text = node.text()
        assert text.count("they differ: optimizer.lr is 0.00") == 1, text
        assert "frame #" not in text and "Traceback" not in text and "[W" not in text, text


@pytest.mark.commands
def test_a_stop_is_heeded_while_the_first_node_is_waited_for(run_of, tmp_path):
    config, _ = run_of
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("localhost", 0))
        meeting = f"localhost:{taken.getsockname()[1]}"
        words = ["--nodes", 2, "--node-rank", 1, "--rendezvous", meeting]
        node = Command(tmp_path, "train", config, *words)
        node.wait_for_text(" waits at ")
        node.process.send_signal(signal.SIGTERM)
        assert node.end() == INTERRUPTED
    assert "Traceback" not in node.text()


@pytest.mark.commands
def test_a_batch_larger_than_the_epochs_is_refused_once(tiny_run, tmp_path):
    settings = {"output_dir": str(tmp_path), "iterations": None, "epochs": 1.0}
    config = write_config(tmp_path, tiny_run, train={**settings, "global_batch_size": 104})
    command = Command(tmp_path, "train", config, "--gpus", 2)
    assert command.end() == BAD_INPUT
    (line,) = (line for line in command.text().splitlines() if "error: " in line)
    assert "train.epochs (1) of 24 samples are 24 samples" in line
    assert "to at most 24, or set train.epochs=4.34" in line
    assert "Traceback" not in command.text()


def test_a_wrong_value_is_refused_before_any_rank_starts(run_of, capsys):
    config, _ = run_of
    assert main(["train", str(config), "--gpus", "2", "train.itertions=5"]) == BAD_INPUT
    assert "did you mean train.iterations?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(gpus=0), "--gpus .0. must be > 0"),
        (dict(nodes=2), "needs --node-rank .0 to 1. and --rendezvous"),
        (dict(nodes=2, node_rank=2, rendezvous="a:1"), "must be from 0 to 1"),
        (dict(nodes=2, node_rank=0, rendezvous="a"), "must be HOST:PORT"),
        (dict(node_rank=1), "must be from 0 to 0, --nodes is 1"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        placement(options(**given))


def test_which_process_is_a_rank(monkeypatch):
    for name in ("RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert not is_rank(options()) and is_rank(options(as_rank=True))
    monkeypatch.setenv("RANK", "1")
    assert is_rank(options()) and not is_rank(options(gpus=8)), "a pod is given one, too"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ConfigError, match="torchrun has started this process"):
        is_rank(options(gpus=8))


def test_a_task_of_srun_is_a_rank(monkeypatch):
    environment = {"PROCID": "9", "LOCALID": "1", "NODEID": "1", "STEP_NUM_TASKS": "16"}
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK")
    for name in (*ours, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # given back after the test
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="16 tasks, which meet at MASTER_ADDR:MASTER_PORT"):
        is_rank(options())
    monkeypatch.setenv("MASTER_ADDR", "a")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert is_rank(options())
    assert [os.environ[name] for name in ours] == ["9", "1", "16", "1"]


@pytest.mark.parametrize(
    "codes, stop_asked, expected, said",
    [
        ({0: 2, 1: -15}, False, BAD_INPUT, ""),
        ({1: 130}, True, INTERRUPTED, ""),
        ({0: 1}, False, FAILED, ""),
        ({0: -15, 1: -15}, True, INTERRUPTED, ""),
        ({3: -9, 0: 3}, False, FAILED, "rank 3 was killed by signal 9 (SIGKILL), often"),
        ({2: -11}, False, FAILED, "rank 2 was killed by signal 11 (SIGSEGV); start"),
    ],
)
def test_exit_codes_of_ranks(codes, stop_asked, expected, said, capsys):
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
        for rank, code in codes.items()
    }
    assert exit_code(failures, stop_asked=stop_asked) == expected
    err = capsys.readouterr().err
    assert said in err if said else not err
