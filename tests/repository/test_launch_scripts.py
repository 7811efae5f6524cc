"""The scripts of examples/multi_node with stand-ins on PATH for dspark and Slurm's commands.

They show what the scripts do with those commands, not that a real Slurm does with them what its
manual says. tests/run/test_multi_node.py runs launch_node.sh with the real dspark.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.paths import ROOT

SCRIPTS = ROOT / "examples" / "multi_node"
STAND_INS = {
    "srun": 'echo "srun $*" >> "$CALLS"; eval "$SRUN_DOES"',
    "dspark": 'echo "dspark $*" >> "$CALLS"',
    "scancel": 'echo "scancel $*" >> "$CALLS"',
    "scontrol": 'if [ "$1" = show ]; then printf "a-%s\\nb\\n" "$3"; '
    'else echo "scontrol $*" >> "$CALLS"; fi',
}
AFTER_SIGNAL = 'until grep -q scancel "$CALLS"; do sleep 0.02; done; '


@pytest.fixture
def environment(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        file = folder / name
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    (tmp_path / "out").mkdir()
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "STATUS": str(tmp_path / "out" / "run_status"),
        "SRUN_DOES": "",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "nodelist",
        "SLURM_CPUS_PER_TASK": "16",
    }


def start(environment, *command):
    def heed_interrupts():  # a shell's background job, in which tests may run, ignores them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [str(c) for c in command], cwd=ROOT, env=environment, preexec_fn=heed_interrupts
    )


def sbatch(environment, *overrides):
    script = SCRIPTS / "train.sbatch"
    output = Path(environment["STATUS"]).parent
    return start(environment, "bash", script, "my run.yaml", output, *overrides)


def calls(environment):
    file = Path(environment["CALLS"])
    return file.read_text().splitlines() if file.exists() else []


def wait_for_call(environment, name):
    deadline = time.monotonic() + 600
    while not any(line.startswith(name) for line in calls(environment)):
        assert time.monotonic() < deadline, calls(environment)
        time.sleep(0.01)


def test_what_a_node_of_a_slurm_job_runs(environment):
    environment["SRUN_DOES"] = 'shift 2; SLURM_NODEID=1 SLURMD_NODENAME=b "$@"'
    assert sbatch(environment, "train.epochs=2").wait(600) == 0
    srun, dspark = calls(environment)
    assert "--cpus-per-task=16" in srun
    assert dspark == (
        f"dspark train --config my run.yaml train.output_dir={Path(environment['STATUS']).parent} "
        "train.epochs=2 --nodes 2 --node-rank 1 --rendezvous a-nodelist:23456 --node-address b"
    )


@pytest.mark.parametrize(
    "srun_does, requeued, code",
    [
        ('echo completed > "$STATUS"', False, 0),
        ('echo stopped > "$STATUS"', True, 0),  # train.exit_duration_minutes
        ('echo running > "$STATUS"; exit 3', False, 3),
        ("exit 3", False, 3),  # before it wrote anything, an older start's word lies there
    ],
)
def test_only_a_stopped_run_is_requeued(environment, srun_does, requeued, code):
    Path(environment["STATUS"]).write_text("stopped\n")
    environment["SRUN_DOES"] = srun_does
    assert sbatch(environment).wait(600) == code
    assert ("scontrol requeue 123456" in calls(environment)) == requeued


@pytest.mark.parametrize(
    "srun_does, requeued",
    [
        ('echo stopped > "$STATUS"; exit 143', True),
        ("exit 130", True),  # it was still starting
        ('echo completed > "$STATUS"', False),
    ],
)
def test_a_signal_is_passed_to_the_tasks_and_the_job_requeued(environment, srun_does, requeued):
    environment["SRUN_DOES"] = AFTER_SIGNAL + srun_does
    job = sbatch(environment)
    wait_for_call(environment, "srun")
    job.send_signal(signal.SIGTERM)
    assert job.wait(600) == 0
    assert "scancel --signal=TERM 123456" in calls(environment)
    assert ("scontrol requeue 123456" in calls(environment)) == requeued
