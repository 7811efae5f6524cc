"""A step that would harm the draft is skipped, the same at every layout, and said."""

import json
import shutil
from pathlib import Path

import pytest

from support.bad_samples import run_poisoned
from support.tiny_target import tiny_config
from support.training_runs import CURVE, curve, latest, run_training

BAD = (5, 17)
"""Of the 24 samples; an epoch is six steps of four."""


def config_of(settings, output, tp=1, **train):
    options = {"output_dir": str(output), "iterations": 12, **train}
    return tiny_config(settings, train=options, parallel={"tensor_parallel": tp})


def skipped(output):
    lines = Path(output, "skipped_samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def assert_same(got, expected):
    assert [row["iteration"] for row in got] == [row["iteration"] for row in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine["skipped_steps"] == theirs["skipped_steps"]
        for name in CURVE:
            wanted = theirs[name]
            assert mine[name] == (wanted and pytest.approx(wanted, rel=1e-4)), name


@pytest.fixture(scope="module")
def poisoned(pool, tiny_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("poisoned")
    config = config_of(tiny_run, output, micro_batch_size=4)
    pool.run(run_poisoned, world=1, tp=1, config=config, samples=BAD)
    return output


def test_a_bad_sample_costs_its_step_and_nothing_else(poisoned, tiny_run):
    rows, lines = curve(poisoned), skipped(poisoned)
    bad = {line["iteration"] for line in lines}
    assert 2 <= len(bad) <= 4 and len(rows) == 12
    for row in rows:
        assert (row["loss"] is None) == (row["grad_norm"] is None) == (row["iteration"] in bad)
    assert rows[-1]["skipped_steps"] == len(bad)
    rates = [row["learning_rate"] for row in rows[1:]]  # the first is of the warm-up
    assert rates == sorted(set(rates), reverse=True)
    last = [row["loss"] for row in rows if row["loss"] is not None][-1]
    assert last < 0.9 * rows[0]["loss"]


def test_the_line_names_the_samples_and_what_was_not_finite(poisoned, tiny_run):
    for line in skipped(poisoned):
        assert set(line["at_fault"]) <= set(BAD) and line["at_fault"]
        assert len(line["samples"]) == 4 and "not finite" in line["reason"]
        for sample in line["samples"]:
            assert sample["file"] == tiny_run["data"]["train_files"][0]
            assert sample["line"] == sample["sample"] + 1
            finite = None not in sample["terms"].values()
            assert finite == (sample["sample"] not in BAD) != sample["at_fault"]
        assert line["consumed_samples"] == 4 * line["iteration"]
        losses = [sum(s["terms"].values()) for s in line["samples"] if not s["at_fault"]]
        assert losses == sorted(losses, reverse=True) and line["samples"][0]["at_fault"]
        assert line["largest_gradients"][0]["largest"] is None
        assert line["loss"] is None and "loss" in line["not_finite"]


@pytest.mark.parametrize("world, tp, micro_batch_size", [(2, 2, 2), (2, 1, 1), (4, 2, 1)])
def test_skips_do_not_depend_on_the_layout(
    pool, tiny_run, poisoned, tmp_path, world, tp, micro_batch_size
):
    config = config_of(tiny_run, tmp_path, tp, micro_batch_size=micro_batch_size)
    pool.run(run_poisoned, world=world, tp=tp, config=config, samples=BAD)
    assert_same(curve(tmp_path), curve(poisoned))
    names = ("iteration", "reason", "at_fault")
    got, expected = (
        [[line[name] for name in names] + [[s["sample"] for s in line["samples"]]] for line in one]
        for one in (skipped(tmp_path), skipped(poisoned))
    )
    assert got == expected


def test_a_run_with_skips_goes_on_at_another_layout(pool, tiny_run, poisoned, tmp_path):
    shutil.copytree(poisoned, tmp_path / "run")
    config = config_of(tiny_run, tmp_path / "run", 2, resume_from=5)
    pool.run(run_poisoned, world=2, tp=2, config=config, samples=BAD)
    assert_same(curve(tmp_path / "run"), curve(poisoned))
    assert len(skipped(tmp_path / "run")) == len(skipped(poisoned))


def weights_after(runtime, config, samples):
    """Of the newest checkpoint, and those that a new run starts with."""
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from dspark_megatron.storage.training_checkpoint import find_checkpoint

    run_poisoned(runtime, config, samples)
    draft = build_draft(check(config, runtime.world_size), runtime)
    found = []
    for _ in range(2):
        trained = [(name, p) for name, p in draft.named_parameters() if p.requires_grad]
        found.append({name: p.detach().clone() for name, p in trained})
        load_checkpoint(find_checkpoint(config.train.output_dir), draft, None)
    return found


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_skips_alone_leaves_the_weights_and_can_be_continued(
    pool, tiny_run, tmp_path, distributed, dtype
):
    config = config_of(tiny_run, tmp_path, iterations=2, dtype=dtype)
    config.optimizer.use_distributed_optimizer = distributed
    ((new, saved),) = pool.run(weights_after, world=1, tp=1, config=config, samples=range(24))
    assert not [name for name in new if not (new[name] == saved[name]).all()]
    config.train.iterations = 4
    pool.run(run_training, world=1, tp=1, config=config)
    rows = curve(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [1, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [True, True, False, False]


def test_too_many_skips_end_the_run_saved_behind_them(pool, tiny_run, tmp_path):
    config = config_of(tiny_run, tmp_path, max_skipped_steps=2)
    with pytest.raises(AssertionError, match="3 of the last 3 steps were skipped.*allows 2"):
        pool.run(run_poisoned, world=2, tp=1, config=config, samples=range(24))
    assert latest(tmp_path) == 3
    pool.run(run_training, world=2, tp=1, config=config)
    rows = curve(tmp_path)
    assert len(rows) == 12 and rows[-1]["skipped_steps"] == 3 and rows[3]["loss"] is not None


def test_a_norm_above_the_bound_is_skipped(pool, tiny_run, poisoned, tmp_path):
    norms = [row["grad_norm"] for row in curve(poisoned) if row["grad_norm"] is not None]
    config = config_of(tiny_run, tmp_path, skip_gradient_norm_above=sorted(norms)[-1] / 2)
    config.train.max_skipped_steps = 12
    pool.run(run_training, world=2, tp=2, config=config)
    rows, lines = curve(tmp_path), skipped(tmp_path)
    assert 0 < len(lines) == rows[-1]["skipped_steps"]
    kept = [row["grad_norm"] for row in rows if row["grad_norm"] is not None]
    assert all(norm <= config.train.skip_gradient_norm_above for norm in kept)
    assert "above train.skip_gradient_norm_above" in lines[0]["reason"] and not lines[0]["at_fault"]
    assert lines[0]["loss"] > 0 and lines[0]["largest_gradients"][0]["largest"] > 0


def test_infinite_states_are_skipped_like_those_that_are_no_numbers(pool, tiny_run, tmp_path):
    config = config_of(tiny_run, tmp_path, iterations=6, log_every=6)
    pool.run(run_poisoned, world=1, tp=1, config=config, samples=(3,), value=float("inf"))
    assert len(skipped(tmp_path)) == 1 and skipped(tmp_path)[0]["at_fault"] == [3]
    (row,) = curve(tmp_path)
    assert row["loss"] > 0 and row["tau"] > 1 and "not_finite" not in row
