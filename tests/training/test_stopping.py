"""Runs that are killed, stopped or at their time limit, and continued at any layout."""

import math
import os
import shutil
import signal
import time

import pytest

from support.tiny_target import tiny_config
from support.training_runs import (
    assert_same_curve,
    curve,
    curve_lines,
    finish,
    kill_tree,
    latest,
    launch,
    run_training,
    run_until_stopped,
    status,
    write_config,
)


def wait_for(condition, process, seconds=240):
    for _ in range(seconds * 500):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)  # a tiny run takes a fraction of a second between checkpoints
    raise AssertionError("it did not happen in time")


def test_killed_stopped_and_continued_at_other_layouts(tiny_run, unbroken, tmp_path):
    """kill -9 at TP 2, then SIGTERM on one rank, which saves at once, then two data-parallel."""
    output = tmp_path / "run"
    lines = output / "metrics.jsonl"
    config_file = write_config(
        tmp_path, tiny_run, train={"output_dir": str(output)}, parallel={"tensor_parallel": 2}
    )
    process = launch(config_file, 2)
    wait_for(lambda: latest(output) >= 5, process)
    kill_tree(process)
    killed_at, of_the_killed = latest(output), lines.stat().st_ino
    assert killed_at < 15, "the run was nearly over before it could be killed"
    process = launch(config_file, 1, "parallel.tensor_parallel=1", "train.save_every=1000")
    wait_for(lambda: lines.stat().st_ino != of_the_killed, process)  # its last lines are dropped
    wait_for(lambda: len(curve_lines(output)) > killed_at, process)
    os.kill(process.pid, signal.SIGTERM)
    code, text = finish(process)
    assert f"iter_{killed_at:07d}" in text and "stopped by a signal" in text
    assert killed_at < latest(output) < 20
    assert f"saved in {output}/checkpoints/iter_{latest(output):07d}" in text
    assert f"next: dspark train {output} --gpus 1\n" in text
    code, text = finish(launch(config_file, 2, "parallel.tensor_parallel=1"))
    assert code == 0, text
    assert_same_curve(curve(output), curve(unbroken))


def test_a_log_interval_survives_a_stop_in_its_middle(pool, tiny_run, tmp_path):
    """Stopped after 10 steps and logged every 4: the line at 12 is the mean of 9 to 12."""
    runs = {name: tmp_path / name for name in ("whole", "halted")}
    for name, output in runs.items():
        settings = {"output_dir": str(output), "log_every": 4}
        config = tiny_config(tiny_run, train=settings, parallel={"tensor_parallel": 2})
        if name == "halted":
            pool.run(run_until_stopped, world=4, tp=2, config=config, steps=10)
            assert latest(output) == 10
        pool.run(run_training, world=2, tp=2, config=config)
    assert_same_curve(curve(runs["halted"]), curve(runs["whole"]))


def test_a_time_limit_that_one_rank_has_reached_stops_all_after_a_step(
    pool, tiny_run, unbroken, tmp_path
):
    """Each start takes one step, however long it took to get there, and saves it."""
    settings = {"output_dir": str(tmp_path), "iterations": 20, "log_every": 4}
    limited = tiny_config(tiny_run, train={**settings, "exit_duration_minutes": 90.0})
    for steps in (1, 2):
        pool.run(run_training, world=2, tp=1, config=limited, minutes_ago=(0, 91))
        assert (latest(tmp_path), status(tmp_path)) == (steps, "stopped\n")
    pool.run(run_training, world=2, tp=1, config=limited, minutes_ago=(0, 0))
    assert (latest(tmp_path), status(tmp_path)) == (20, "completed\n")
    grad_norms = {row["iteration"]: row["grad_norm"] for row in curve(unbroken)}
    assert curve(tmp_path)[-1]["grad_norm"] == pytest.approx(grad_norms[20], rel=1e-4)


def test_a_signal_before_the_first_step_stops_all_ranks_there(pool, tiny_run, tmp_path):
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path)})
    pool.run(run_training, world=2, tp=2, config=config, stopped=(1,))
    assert (latest(tmp_path), status(tmp_path)) == (0, "stopped\n")


def test_a_lengthened_run_is_no_longer_complete(pool, tiny_run, unbroken, tmp_path):
    assert status(unbroken) == "completed\n"
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    for iterations, stopped in ((40, (0,)), (20, (0,))):  # complete already: nothing to stop
        config = tiny_config(
            tiny_run, train={"output_dir": str(tmp_path), "iterations": iterations}
        )
        pool.run(run_training, world=1, tp=1, config=config, stopped=stopped)
        assert status(tmp_path) == ("stopped\n" if iterations == 40 else "completed\n")


def test_without_the_distributed_optimizer_at_another_layout(pool, tiny_run, unbroken, tmp_path):
    plain = {"use_distributed_optimizer": False}
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path)}, optimizer=plain)
    pool.run(run_until_stopped, world=1, tp=1, config=config, steps=7)
    split = tiny_config(
        tiny_run,
        train={"output_dir": str(tmp_path)},
        optimizer=plain,
        parallel={"tensor_parallel": 2},
    )
    pool.run(run_training, world=4, tp=2, config=split)
    assert_same_curve(curve(tmp_path), curve(unbroken))


def test_learning_rate_and_length_may_change_on_the_way(pool, tiny_run, tmp_path):
    before = tiny_config(tiny_run, train={"output_dir": str(tmp_path)})
    pool.run(run_until_stopped, world=1, tp=1, config=before, steps=6, number=signal.SIGINT)
    settings = {"output_dir": str(tmp_path), "iterations": 10}
    after = tiny_config(tiny_run, train=settings, optimizer={"lr": 1e-3, "min_lr_ratio": 0.5})
    pool.run(run_training, world=1, tp=1, config=after)
    rates = [row["learning_rate"] for row in curve(tmp_path)]
    assert max(rates) == rates[3] == 1e-2
    cosine = [0.5 + 0.5 * (1 + math.cos(math.pi * (i - 2) / 8)) / 2 for i in range(7, 11)]
    assert rates[6:] == pytest.approx([1e-3 * c for c in cosine])
