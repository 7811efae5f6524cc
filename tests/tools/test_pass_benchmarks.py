"""The benchmarks of passes and of waiting for data compare equal things. No time is tested."""

from pathlib import Path

import benchmark_data_wait
import benchmark_passes
import pytest


def pass_rows(runtime, folder):
    sizes = "--hidden 32 --ffn 48 --heads 4 --kv-heads 2 --layers 3 --micro-batches 8 --rounds 1"
    args = benchmark_passes.parse_arguments([*sizes.split(), "--longest", "20"])
    return benchmark_passes.table_rows(args, runtime, Path(folder))


def test_passes_are_compared_on_the_same_micro_batches(pool, tmp_path):
    """table_rows raises where their states differ. What is gathered falls with the passes."""
    for rows in pool.run(pass_rows, world=2, tp=1, folder=str(tmp_path)):
        assert [row["shared by"] for row in rows] == [1, 1, 1, 2, 2, 2]
        assert all(row["gathered MiB"] == 0 for row in rows[:3])
        assert [row["passes"] for row in rows[3:]] == [8, 2, 1]
        ratios = [row["gathered / one by one"] for row in rows[3:]]
        assert ratios == pytest.approx([1, 1 / 4, 1 / 8])


def wait_rows(runtime):
    sizes = "--seq-length 64 --num-anchors 8 --micro-batches 2 --rounds 1"
    args = benchmark_data_wait.parse_arguments(sizes.split())
    return benchmark_data_wait.table_rows(args, runtime)


def test_waiting_for_data_is_measured_on_equal_steps(pool):
    [rows] = pool.run(wait_rows, world=1, tp=1)
    assert [row["made"] for row in rows] == ["when asked for", "a step ahead"]
    assert all(0 < row["share waited"] < 1 for row in rows)
