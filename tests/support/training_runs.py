"""Training runs in the rank processes and under torchrun, and what they leave behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support.paths import ROOT
from support.tiny_target import tiny_config

OF_TIME = re.compile(
    "time|.*_seconds|data_wait_share|tokens_per_second.*|tflops_per_rank|peak_memory_gib"
)
"""Keys of a logged step whose values are no part of the curve."""
CURVE = ("loss", "ce_loss", "l1_loss", "confidence_loss", "tau", "grad_norm", "learning_rate")


def run_training(runtime, config, minutes_ago=(), stopped=()):
    """minutes_ago: when each rank was launched; stopped: ranks that have had a signal since."""
    from dspark_megatron.run.check import check
    from dspark_megatron.training.ending.stop_requests import stop_requests
    from dspark_megatron.training.loop import train

    plan = check(config, runtime.world_size, use="train")
    with stop_requests() as stop:
        if minutes_ago:
            stop.started -= 60 * minutes_ago[runtime.rank]
        if runtime.rank in stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        train(plan, runtime, stop)


def train_in_own_folder(runtime, config, folders):
    """A rank whose relative paths lead to files of its own, as on a node without a shared disk."""
    before = os.getcwd()
    os.chdir(folders[runtime.rank])
    try:
        run_training(runtime, config)
    finally:
        os.chdir(before)


def curve(output):
    lines = Path(output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def untimed(rows):
    """What two runs must have alike."""
    return [{key: row[key] for key in row if not OF_TIME.fullmatch(key)} for row in rows]


def assert_same_curve(got, expected, rel=1e-4):
    assert [row["iteration"] for row in got] == [row["iteration"] for row in expected]
    for mine, theirs in zip(got, expected, strict=True):
        for name in CURVE:
            assert mine[name] == pytest.approx(theirs[name], rel=rel), (
                f"{name} at iteration {mine['iteration']}"
            )
        assert mine["accept_rate"] == pytest.approx(theirs["accept_rate"], rel=rel, abs=1e-6)


def torchrun(ranks, *program):
    """Arguments of Python."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program]


def launch(config_file, ranks, *overrides, module="train", **kwargs):
    program = ["-m", f"dspark_megatron.{module}", "--config", str(config_file), *overrides]
    return subprocess.Popen(
        [sys.executable, *torchrun(ranks, *program)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **kwargs,
    )


def finish(process):
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


def write_config(folder, settings, **sections):
    path = Path(folder) / "run.yaml"
    path.write_text(tiny_config(settings, **sections).to_yaml(), encoding="utf-8")
    return path


def kill_tree(process):
    """kill -9 of the launcher and all ranks (torchrun puts each in a session of its own). What
    ranks have started by multiprocessing must end by itself."""
    launcher = psutil.Process(process.pid)
    started = launcher.children(recursive=True)
    for one in [*started, launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a writer that is through
            if "multiprocessing" not in " ".join(one.cmdline()):
                one.kill()
    _, alive = psutil.wait_procs(started, timeout=120)
    commands = [one.cmdline() for one in alive]
    for one in alive:
        one.kill()
    process.communicate()
    assert not commands


def latest(output):
    tracker = Path(output, "checkpoints", "latest_checkpointed_iteration.txt")
    return int(tracker.read_text()) if tracker.exists() else 0


def curve_lines(output):
    return Path(output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def status(output):
    return Path(output, "run_status").read_text()


def run_until_stopped(runtime, config, steps, number=signal.SIGTERM):
    """A run that gets a signal in its `steps`-th step."""
    from dspark_megatron.training import loop

    train_step, done = loop.Trainer._train_step, []

    def counted(self, metrics):
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), number)
        return train_step(self, metrics)

    loop.Trainer._train_step = counted
    try:
        run_training(runtime, config)
    finally:
        loop.Trainer._train_step = train_step
