"""What a run shows while it trains, and the figures of its time, memory and operations."""

import re
from datetime import datetime
from pathlib import Path

import pytest
import torch

from dspark_megatron.config import TrainConfig
from dspark_megatron.run.checkpoints.state import RunState
from dspark_megatron.training.watching.lines import small, step_line, stopped_lines
from dspark_megatron.training.watching.step_parts import StepParts
from support.paths import ROOT
from support.training_runs import curve, finish, launch, write_config

pytestmark = pytest.mark.slow


def test_a_step_of_the_log():
    row = {
        "iteration": 120,
        "loss": 2.3149,
        "tau": 2.9,
        "grad_norm": 0.5,
        "learning_rate": 6e-4,
        "tokens_per_second_per_rank": 8100.0,
        "tflops_per_rank": 211.9,
        "peak_memory_gib": 61.0,
        "step_seconds": 8.35,
    }
    line = "step 120/4000  loss 2.31  tau 2.9  grad 0.5  lr 6e-4  8.1k tok/s/GPU  "
    assert step_line(row, 4000, rank="GPU") == line + "212 TFLOP/s/GPU  61 GiB  ETA 9 h"
    nothing = {"iteration": 1, "loss": float("nan"), "tau": None}
    assert step_line(nothing, 2, rank="GPU") == "step 1/2"
    assert [small(x) for x in (1.25e-5, 0.0, 1e-2)] == ["1.25e-5", "0", "1e-2"]


@pytest.mark.parametrize(
    "iteration, ranks_of_node, settings, saved, options",
    [
        (12, 4, {}, "saved in runs/x/checkpoints/iter_0000012", "--gpus 4"),
        (0, 4, {}, "nothing is saved, since no step was taken", "--gpus 4"),
        (3, 2, {}, "saved", "--gpus 2 --nodes 2 --node-rank R --rendezvous HOST:PORT"),
        (3, 4, {"resume": False}, "saved", "--gpus 4 train.resume=true train.overwrite=false"),
    ],
)
def test_a_stopped_run_names_its_checkpoint_and_the_command_that_goes_on(
    iteration, ranks_of_node, settings, saved, options, monkeypatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_of_node))
    train, state = TrainConfig(output_dir="runs/x", **settings), RunState(iteration, 8 * iteration)
    first, second = stopped_lines("a signal", Path("runs/x"), state, "so much", train, 4)
    assert first.startswith(f"stopped by a signal after so much; {saved}")
    assert second == f"next: dspark train runs/x {options}"


def test_a_part_within_another_is_counted_by_itself_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    parts = StepParts(torch.device("cpu"))

    def passes(seconds):
        now[0] += seconds

    for _ in range(2):
        with parts.part("draft"):
            passes(1)
            with parts.part("target"):
                passes(10)
            passes(2)
        passes(100)
    assert parts.seconds() == pytest.approx({"draft": 6, "target": 20})
    assert parts.seconds() == {}


def test_a_run_in_a_log_file(tiny_run, tmp_path):
    output = tmp_path / "run"
    settings = {"output_dir": str(output), "iterations": 4, "log_every": 2}
    code, text = finish(launch(write_config(tmp_path, tiny_run, train=settings), 2))
    assert code == 0, text
    assert "\r" not in text and "\x1b" not in text
    steps = re.findall(r"(?m)^step (\d)/4  loss \S+  tau \S+  grad \S+  lr .* tok/s/rank .*$", text)
    assert steps == ["2", "4"]
    assert "starts from new weights" in text and f"next: dspark evaluate {output}" in text
    assert f"newest checkpoint: {output}/checkpoints/iter_0000004" in text
    for row in curve(output):
        datetime.strptime(row["time"], "%Y-%m-%dT%H:%M:%SZ")
        parts = [row[f"{name}_seconds"] for name in ("target", "draft", "optimizer", "data_wait")]
        assert min(parts) >= 0 and 0 < sum(parts) <= row["step_seconds"]
        both = row["tokens_per_second"] / 2
        assert row["tokens_per_second_per_rank"] == pytest.approx(both)
        assert row["peak_memory_gib"] > 0.01
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert not {key for key in curve(output)[0] if f"`{key}`" not in page}
