"""Spikes are marked, and what is written is JSON."""

import json
from unittest import mock

import pytest
import torch

from dspark_megatron.training.health.spikes import Spikes
from dspark_megatron.training.heldout import HeldOut
from dspark_megatron.training.metrics import MetricSums
from dspark_megatron.training.reporter import Reporter

NAN = float("nan")


def rows(losses, first=1):
    return [{"iteration": first + i, "loss": x, "grad_norm": 1.0} for i, x in enumerate(losses)]


def strict(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_a_jump_is_a_spike_and_a_falling_noisy_loss_has_none():
    falling = [3 / (1 + i / 20) + (0.1 if i % 3 else -0.1) for i in range(60)]
    spikes = Spikes()
    assert not any(spikes.found(row) for row in rows(falling))
    assert spikes.found({"loss": 2.5, "grad_norm": 9.0}) == ["loss", "grad_norm"]
    assert spikes.found({"loss": 0.8, "grad_norm": None}) == []
    assert Spikes(rows([1.0] * 9)).found({"loss": 5.0}) == []  # too few to compare with


def reporter(folder, start=0):
    return Reporter(folder, iterations=100, start=start, tensorboard=True)


def test_spikes_are_marked_the_same_after_a_resume(tmp_path):
    noisy = [1.0 + i % 5 / 100 for i in range(20)] + [2.0, 1.0, 1.9]
    for folder, stop in ((tmp_path / "whole", 23), (tmp_path / "resumed", 15)):
        folder.mkdir()
        one = reporter(folder)
        for row in rows(noisy[: stop + 2]):  # the last two are lost by a kill
            one.log(row)
        one.close()
        again = reporter(folder, start=stop)
        for row in rows(noisy[stop:], first=stop + 1):
            again.log(row)
        again.close()
        found = strict(folder / "metrics.jsonl")
        assert [row["iteration"] for row in found] == list(range(1, 24))
        assert {r["iteration"]: r["spike"] for r in found if "spike" in r} == {
            21: ["loss"],
            23: ["loss"],
        }


def test_numbers_that_are_none_are_null_and_named_in_every_file(tmp_path):
    one = reporter(tmp_path)
    one.log({"iteration": 1, "loss": NAN, "accept_rate": [0.5, float("inf")]})
    one.log_heldout({"iteration": 1, "tau": NAN}, is_best=False)
    sample = {"sample": 4, "file": "a", "line": 5, "at_fault": True, "terms": {"ce": NAN}}
    one.log_skipped({"iteration": 1, "reason": "x", "samples": [sample]})
    one.close()
    (row,) = strict(tmp_path / "metrics.jsonl")
    assert row["loss"] is None and row["accept_rate"] == [0.5, None]
    assert row["not_finite"] == ["loss", "accept_rate.1"]
    assert strict(tmp_path / "heldout.jsonl")[0]["tau"] is None
    assert strict(tmp_path / "skipped_samples.jsonl")[0]["not_finite"] == ["samples.0.terms.ce"]


@pytest.mark.parametrize(("tau", "wins"), [(NAN, False), (None, False), (1.5, True)])
def test_an_estimate_that_is_no_number_is_never_the_best(pool, tau, wins):
    assert pool.run(is_best, world=1, tp=1, tau=tau) == [[wins, wins, wins]]


def is_best(runtime, tau):
    from dspark_megatron.run.checkpoints.state import BestEstimate

    heldout = mock.Mock(runtime=runtime, conditions={"samples": 1})
    others = (None, BestEstimate(1, NAN, {"samples": 1}), BestEstimate(1, 9.0, {"samples": 2}))
    return [HeldOut._is_best(heldout, tau, best) for best in others]


def test_sums_go_on_from_what_a_checkpoint_kept_and_never_from_nonsense():
    metrics = MetricSums.zeros(3, torch.device("cpu"))
    metrics.add(divisor=2.0, loss_sum=4.0, tokens=7.0)
    kept = metrics.packed().tolist()

    def loss(sums):
        found = MetricSums.zeros(3, torch.device("cpu")).continued(sums)
        assert found.scalars["tokens"] == 0
        return found.means({"ce": 1.0})["loss"]

    assert loss(kept) == 2
    assert [loss(wrong) for wrong in ((), kept[1:], [NAN, *kept[1:]])] == [None] * 3
