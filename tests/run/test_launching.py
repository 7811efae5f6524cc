"""Under torchrun one message of one rank ends all."""

import os
import socket
import subprocess
import sys
from argparse import Namespace

import pytest
import yaml

from dspark_megatron.errors import FAILED, ConfigError
from dspark_megatron.run.ranks.job import Launch
from dspark_megatron.training.command import run
from support.paths import ROOT
from support.tool_runs import run_python
from support.training_runs import finish, launch, torchrun


@pytest.mark.commands
def test_bad_settings_end_all_ranks_with_one_message(tiny_run, tmp_path):
    settings = {name: dict(values) for name, values in tiny_run.items()}
    settings["parallel"] = {"tensor_parallel": 2}
    settings["model"]["num_attention_heads"] = 9
    settings["model"]["num_key_value_heads"] = 3
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(settings))
    code, text = finish(launch(path, 2))
    assert code != 0
    assert text.count("must be divisible by parallel.tensor_parallel (2)") == 1
    assert "query heads (9), key/value heads (3)" in text and "that work here: [1]" in text


FAILING_JOB = """
import sys, torch
from dspark_megatron.run.ranks.runtime import launch, start
def main():
    with launch() as job:
        runtime = start(job, 1)
        if job.rank == 1:
            raise RuntimeError("disk on fire")
        torch.distributed.barrier()
if __name__ == "__main__":
    main()
"""


@pytest.mark.commands
def test_a_failure_on_one_rank_ends_all_with_its_message(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(FAILING_JOB)
    code, text = run_python(*torchrun(2, script))
    assert code != 0
    assert "rank 1 failed" in text and "disk on fire" in text
    assert "rank 0 failed" not in text, "only the first failure is shown"
    assert "\nrank 1 failed" in f"\n{text}", "on a line of its own"
    assert "rank      : 1" in text.partition("Root Cause")[2], "torchrun names the same rank"


WAITING_JOB = """
import os, signal, sys, time, torch
from dspark_megatron.run.ranks.places import set_time_limit
from dspark_megatron.run.ranks.places import at
from dspark_megatron.run.ranks.runtime import launch, start
def main():
    with launch() as job:
        set_time_limit(0.05)
        start(job, 1)
        at("step 3")
        torch.distributed.barrier()
        while job.rank == 1 and b"step 3" not in job.store.get("dspark_sign/1"):
            time.sleep(0.1)
        if job.rank == 1 and sys.argv[1] == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif job.rank == 1:
            time.sleep(600)
        at("step 4")
        torch.distributed.barrier()
if __name__ == "__main__":
    main()
"""


def started_alone(script, how, rank, port):
    """A rank without torchrun, as other launchers start it."""
    job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    job |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, str(script), how],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in job.items()}},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.commands
@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_rank_that_does_not_come_is_named_by_those_that_wait(tmp_path, how):
    script = tmp_path / "job.py"
    script.write_text(WAITING_JOB)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = [started_alone(script, how, rank, port) for rank in range(2)]
    try:
        text, _ = ranks[0].communicate(timeout=900)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == FAILED, text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert "ranks waited" in line and "for each other (train.timeout_minutes): rank 1 (" in line
    silent = "gives no sign of life; it was last heard of at step 3"
    assert (silent if how == "stopped" else "is still at step 3") in line
    assert "Waiting: rank 0 at step 4 (barrier" in line


def test_one_process_without_a_rank_plans_for_all(tiny_run, tmp_path, monkeypatch, capsys):
    """It waits for no other; one that was given a rank would."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "32")
    arguments = Namespace(config=str(path), overrides=["train.timeout_minutes=0.001"], dry_run=True)
    run(Launch.from_environment(), arguments, None, lambda config, ranks: f"for {ranks} ranks")
    assert capsys.readouterr().out == "for 32 ranks\n"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="ranks 1-31 of 32 did not come"):
        run(Launch.from_environment(), arguments, None, lambda config, ranks: "")
