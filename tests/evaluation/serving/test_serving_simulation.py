"""Replayed drafts against a case done by hand, and what must hold of any of them."""

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.serving.serving_simulation import (
    replay,
    simulate_serving,
    tokens_gained,
)
from dspark_megatron.evaluation.serving.settings import ServingSettings
from dspark_megatron.evaluation.serving.sps_table import AdditiveSps, SampledSps
from dspark_megatron.evaluation.serving.verify_policies import threshold_lengths


def make_records(confidence, accepted, prompt, proposed=None):
    confidence = torch.tensor(confidence)
    rounds, slots = confidence.shape
    return DraftRecords(
        confidence_logits=confidence.logit(),
        accept_rate=confidence,
        proposed=torch.tensor(proposed or [slots] * rounds),
        accepted=torch.tensor(accepted),
        prompt=torch.tensor(prompt),
        facts={"block_size": slots},
    )


def calibrated_records(rounds=4000, slots=5):
    """Slots are kept with just the chance that their confidence says; some rounds are easy."""
    generator = torch.Generator().manual_seed(0)
    ease = torch.rand(rounds, 1, generator=generator)
    confidence = (ease + 0.3 * torch.rand(rounds, slots, generator=generator)).clamp(0.02, 0.98)
    kept = torch.rand(rounds, slots, generator=generator) < confidence
    accepted = kept.long().cumprod(dim=1).sum(dim=1)
    return make_records(
        confidence.tolist(), accepted.tolist(), (torch.arange(rounds) // 10).tolist()
    )


def throughputs(records, table, requests, **settings):
    rows = simulate_serving(records, table, [requests], ServingSettings(**settings))
    return {row["policy"]: row["tokens_per_second"] for row in rows}


EASY_THEN_HARD = make_records([[0.9, 0.8], [0.2, 0.9]], accepted=[2, 0], prompt=[0, 0])
TABLE = SampledSps([1, 2, 3], [10.0, 8.0, 5.5], 3)


def test_one_request_by_hand():
    """Two rounds in turn; 1, 2 or 3 tokens are verified in 1/10, 1/8 or 1/5.5 s."""
    rows = simulate_serving(EASY_THEN_HARD, TABLE, [1], ServingSettings(rounds=64))
    found = {row["policy"]: row for row in rows}
    expected = {  # tokens and seconds of the easy and the hard round
        "no drafting": (1 + 1) / (1 / 10 + 1 / 10),
        "fixed 1": (2 + 1) / (1 / 8 + 1 / 8),
        "fixed 2": (3 + 1) / (1 / 5.5 + 1 / 5.5),
        "threshold 0.5": (3 + 1) / (1 / 5.5 + 1 / 10),
        # Easy: 1 * 10 < 1.9 * 8 > 2.62 * 5.5, so one slot; hard: 1 * 10 > 1.2 * 8, so none.
        "early stopping": (2 + 1) / (1 / 8 + 1 / 10),
    }
    for policy, rate in expected.items():
        assert found[policy]["tokens_per_second"] == pytest.approx(rate), policy
    assert found["fixed 2"]["tau"] == 2.0 and found["early stopping"]["verified"] == 0.5
    assert found["fixed 1"]["speedup"] == pytest.approx(1.2)


def test_a_budget_comes_from_an_earlier_step():
    """With lag 1 the easy round is verified by the hard one's budget of 0 and the other way round;
    with lag 2 each has its own."""
    lag_1 = (1 + 1) / (1 / 10 + 1 / 8)
    lag_2 = (2 + 1) / (1 / 8 + 1 / 10)
    for lag, rate in ((1, lag_1), (2, lag_2)):
        found = throughputs(EASY_THEN_HARD, TABLE, 1, rounds=64, lag=lag)
        assert found[f"budget, lag {lag}"] == pytest.approx(rate), lag


def test_drafting_takes_its_time_where_there_are_drafts():
    found = throughputs(EASY_THEN_HARD, TABLE, 1, rounds=64, draft_seconds=0.05)
    assert found["no drafting"] == pytest.approx(10)
    assert found["fixed 1"] == pytest.approx(3 / (2 / 8 + 0.1))


def test_time_passes_between_the_points_of_a_table():
    """Two requests of two slots verify 2 to 6 tokens, and the table has points at 2 and 6 only. A
    scheduler that reads it with floor look-up takes the tokens before 6 for free; the clock does
    not."""
    records = make_records([[0.5, 0.5]], [0], [0])
    table = SampledSps([2, 6], [10.0, 2.0], 6)
    for interpolate, slots in ((False, 3), (True, 0)):
        settings = ServingSettings(rounds=1, interpolate=interpolate)
        rows = simulate_serving(records, table, [2], settings)
        found = {row["policy"]: row for row in rows}["early stopping"]
        assert found["verified"] == slots / 2
        assert found["tokens_per_second"] == pytest.approx(2 / (0.1 + slots * 0.1))


def test_temperatures_divide_the_logits():
    """Colder confidences let the early round's second slot pay: 1.9 -> nearly 2."""
    found = throughputs(EASY_THEN_HARD, TABLE, 1, rounds=64, temperatures=[0.2, 0.2])
    assert found["early stopping"] == pytest.approx(4 / (1 / 5.5 + 1 / 10))


def test_tokens_of_a_round():
    """A kept stop token is the last: the third round judged one slot and the target added none."""
    records = make_records([[0.5] * 3] * 3, [0, 2, 1], [0, 0, 0], proposed=[3, 3, 1])
    gained = [tokens_gained(records, torch.arange(3), torch.full((3,), n)) for n in range(4)]
    assert torch.stack(gained).tolist() == [[1, 1, 1], [1, 2, 1], [1, 3, 1], [1, 3, 1]]


def test_a_threshold_looks_at_each_slot_alone():
    confidence = torch.tensor([[0.9, 0.6, 0.9], [0.6, 0.4, 0.9], [0.4, 0.9, 0.9]])
    assert threshold_lengths(confidence, 0.5).tolist() == [3, 1, 0]


def test_rounds_are_replayed_in_order_and_prompts_in_turn():
    prompt = [4, 0, 4, 0, 0, 2]  # of several data-parallel ranks: not one prompt after the other
    records = make_records([[0.5]] * 6, [0] * 6, prompt)
    rounds = {4: [0, 2], 0: [1, 3, 4], 2: [5]}
    steps = torch.stack(list(replay(records, 5, 40, seed=1)))  # [40, 5]
    assert torch.equal(steps, torch.stack(list(replay(records, 5, 40, seed=1))))
    assert not torch.equal(steps, torch.stack(list(replay(records, 5, 40, seed=2))))
    for row in steps.t().tolist():
        for now, then in zip(row, row[1:], strict=False):
            mine = rounds[prompt[now]]
            if now == mine[-1]:
                assert then == rounds[prompt[then]][0]
            else:
                assert then == mine[mine.index(now) + 1]
    counts = torch.bincount(steps.flatten(), minlength=6)
    assert counts.min() > 0.7 * counts.max()


def test_free_tokens_are_verified_and_dear_ones_are_not():
    records = calibrated_records(rounds=200)
    flat = AdditiveSps(0.01, [1], [0.0], [1, 200], [0.0, 0.0])
    found = throughputs(records, flat, 8, rounds=512)
    assert found["early stopping"] == found["budget, lag 2"] == found["fixed 5"]
    assert found["fixed 5"] > 1.5 * found["no drafting"]
    steep = AdditiveSps(1e-4, [1], [0.0], [8, 200], [0.0, 19.2])  # 0.1 s for every draft token
    found = throughputs(records, steep, 8, rounds=512)
    assert found["early stopping"] == found["budget, lag 2"] == found["no drafting"]
    assert found["fixed 1"] < 0.01 * found["no drafting"]


@pytest.mark.parametrize("seconds_per_token", [2e-4, 1e-3, 4e-3])
def test_calibrated_confidences_beat_every_fixed_length(seconds_per_token):
    """A scheduler knows the cost and the chances of each round, a fixed length only their means."""
    line = AdditiveSps(0.02, [1], [0.0], [1, 400], [0.0, 399 * seconds_per_token])
    found = throughputs(calibrated_records(), line, 32)
    scheduled = [found.pop(name) for name in ("early stopping", "budget, lag 2")]
    assert min(scheduled) > 1.01 * max(found.values()), (scheduled, found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperatures": [1.0]}, "temperatures must be 2 positive"),
        ({"temperatures": [1.0, 0.0]}, "temperatures must be 2 positive"),
        ({"thresholds": (1.5,)}, "between 0 and 1"),
        ({"lag": 0}, r"lag \(0\)"),
        ({"draft_seconds": -1.0}, "draft_seconds"),
        ({"rounds": 0}, r"rounds \(0\)"),
    ],
)
def test_settings_that_cannot_be_simulated_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        simulate_serving(EASY_THEN_HARD, TABLE, [1], ServingSettings(**settings))


def test_what_cannot_be_replayed_is_refused():
    settings = ServingSettings(rounds=1)
    cut = [
        make_records([[0.5] * 2] * 2, [1, 0], [0, 0], proposed=[1, 2]),  # not the last round
        make_records([[0.5] * 2] * 2, [0, 0], [0, 0], proposed=[2, 1]),  # no stop token was kept
    ]
    for records in cut:
        with pytest.raises(ConfigError, match="1 of 2 that were cut"):
            simulate_serving(records, TABLE, [1], settings)
    blind = make_records([[float("nan")] * 2], [0], [0])
    with pytest.raises(ConfigError, match="confidence head"):
        simulate_serving(blind, TABLE, [1], settings)
    with pytest.raises(ConfigError, match="and it ends at 3"):
        simulate_serving(EASY_THEN_HARD, TABLE, [1, 2], settings)
    for requests in ([], [0]):
        with pytest.raises(ConfigError, match="requests must be"):
            simulate_serving(EASY_THEN_HARD, TABLE, requests, settings)
