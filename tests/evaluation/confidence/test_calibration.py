"""Temperatures, calibration figures and the threshold sweep, against plain twins and truth."""

import math

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.confidence.calibration import CalibrationSettings, calibrate
from dspark_megatron.evaluation.confidence.calibration_gain import GainJudge
from dspark_megatron.evaluation.confidence.calibration_records import load_records, split_by_prompt
from dspark_megatron.evaluation.confidence.probability_metrics import (
    auc,
    binned,
    brier,
    noise_floor,
)
from dspark_megatron.evaluation.confidence.temperature_scaling import (
    confidence,
    fit_temperatures,
    kept_labels,
    survival_labels,
    temperature_grid,
)
from dspark_megatron.evaluation.confidence.threshold_sweep import threshold_sweep
from support.synthetic_records import synthetic_records

GRID = temperature_grid()


def plain_ece(predictions, labels, bins):
    pairs, error = list(zip(predictions.tolist(), labels.tolist(), strict=True)), 0.0
    for i in range(bins):
        inside = [(p, y) for p, y in pairs if i <= p * bins < i + 1 or (i == bins - 1 and p == 1)]
        error += abs(sum(p - y for p, y in inside))
    return error / len(pairs)


def plain_auc(predictions, labels):
    wins = pairs = 0.0
    for p, y in zip(predictions.tolist(), labels.tolist(), strict=True):
        for other, z in zip(predictions.tolist(), labels.tolist(), strict=True):
            pairs += y * (1 - z)
            wins += y * (1 - z) * (1 if p > other else 0.5 if p == other else 0)
    return wins / pairs


def fitted(records, labels="observed", bins=20):
    return fit_temperatures(records.confidence_logits, survival_labels(records, labels), GRID, bins)


@pytest.mark.parametrize("soft", [False, True])
def test_metrics_equal_their_plain_twins(soft):
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randint(0, 31, (300,), generator=generator).double() / 30  # with ties
    labels = torch.rand(300, generator=generator, dtype=torch.float64)
    labels = labels if soft else (labels < predictions).double()
    error = binned(predictions, labels, 7).calibration_error
    assert error == pytest.approx(plain_ece(predictions, labels, 7), abs=1e-12)
    assert auc(predictions, labels) == pytest.approx(plain_auc(predictions, labels), abs=1e-12)
    if not soft:
        squares = ((predictions - labels) ** 2).mean()
        assert brier(predictions, labels) == pytest.approx(float(squares), abs=1e-12)
    drawn = torch.bernoulli(labels.expand(4000, -1), generator=generator)
    mean_square = float(((predictions - drawn) ** 2).mean())
    assert brier(predictions, labels) == pytest.approx(mean_square, abs=2e-3)


def test_the_noise_floor_is_the_error_of_calibrated_predictions():
    generator = torch.Generator().manual_seed(1)
    predictions = torch.rand(500, generator=generator, dtype=torch.float64)
    labels = torch.bernoulli(predictions.expand(200, -1), generator=generator)
    errors = [binned(predictions, y, 20).calibration_error for y in labels]
    floor = noise_floor(predictions, 20, seed=0)
    assert floor == pytest.approx(sum(errors) / 200, rel=0.05)
    assert floor == noise_floor(predictions, 20, seed=0) != noise_floor(predictions, 20, seed=1)


def test_known_temperatures_are_found():
    true = [GRID[i] for i in (25, 17, 28)]
    records = synthetic_records(prompts=100, rounds=400, temperatures=true)
    found = fitted(records, "expected")
    for slot, (mine, wanted) in enumerate(zip(found, true, strict=True)):
        steps = abs(GRID.index(mine) - GRID.index(wanted))
        assert steps <= 1, f"slot {slot}: {mine} is {steps} steps from {wanted}"
    result = calibrate(records, CalibrationSettings())
    before, after = result["survival"]["before"], result["survival"]["after"]
    for slot in range(3):
        assert after["ece"][slot] < before["ece"][slot] / 2
        assert after["ece"][slot] < 2.5 * after["noise_floor"][slot]
        assert after["brier"][slot] < before["brier"][slot]


def test_calibrated_confidence_is_left_alone():
    result = calibrate(
        synthetic_records(prompts=50, rounds=200, temperatures=[1.0] * 3), CalibrationSettings()
    )
    before, after = result["survival"]["before"], result["survival"]["after"]
    for slot, temperature in enumerate(result["temperatures"]):
        assert 0.75 < temperature < 1.34
        assert after["ece"][slot] < before["ece"][slot] + before["noise_floor"][slot]


def test_temperatures_that_fit_noise_are_turned_down():
    """A calibrated head and few rounds: the fit finds other temperatures nearly every time."""
    fitted = used = 0
    for seed in range(20):
        records = synthetic_records(prompts=16, rounds=15, temperatures=[1.0] * 3, seed=seed)
        result = calibrate(records, CalibrationSettings())
        fitted += any(t != 1 for t in result["fitted_temperatures"])
        if result["temperatures"] == [1.0] * 3:
            assert result["survival"]["before"] == result["survival"]["after"]
            assert result["verdict"].startswith("T = 1 is kept in all slots")
            continue
        used += 1
        before, after = (sum(result["survival"][when]["ece"]) for when in ("before", "after"))
        assert after <= before
        assert "are used in slots" in result["verdict"]
    assert fitted >= 15 and used <= 2


def test_few_prompts_cannot_speak_for_a_temperature():
    records = synthetic_records(prompts=10, rounds=300, temperatures=[3.0])
    result = calibrate(records, CalibrationSettings())
    assert result["fitted_temperatures"] != [1.0] == result["temperatures"]
    assert "at least 6 prompts held out" in result["notes"][0]
    more = synthetic_records(prompts=12, rounds=300, temperatures=[3.0])
    assert calibrate(more, CalibrationSettings())["temperatures"] != [1.0]


def test_the_gain_of_temperatures_equals_a_count_by_hand():
    logits, prompt = torch.tensor([[2.0], [2.0], [-1.0], [1.0]]), torch.tensor([7, 7, 9, 4])
    labels = torch.tensor([[1.0], [0.0], [0.0], [math.nan]]).double()
    logits, labels, prompt = (torch.cat([x] * 3) for x in (logits, labels, prompt))
    prompt += torch.arange(3).repeat_interleave(4) * 10

    def loss(t):
        return sum(
            -math.log(p if y else 1 - p)
            for x, y in ((2, 1), (2, 0), (-1, 0))
            for p in [1 / (1 + math.exp(-x / t))]
        )

    gain = GainJudge(logits, labels, prompt, bins=20).gain([1.0], [2.0])
    assert gain.mean == pytest.approx((loss(1) - loss(2)) / 3, abs=1e-12)
    assert gain.low < gain.mean < gain.high
    again = GainJudge(logits, labels, prompt, bins=20).gain([2.0], [1.0])
    assert again.mean == pytest.approx(-gain.mean) and again.lowers_error != gain.lowers_error


def test_each_slot_is_fitted_on_top_of_those_before():
    """With one bin the error is |mean survival - its label|, so slot 1 makes up for what the grid
    of slot 0 could not reach; fitted by itself it would stay at 1."""
    rows = 1000
    logits = torch.tensor([[0.5, 2.0]]).expand(rows, -1)
    chance = torch.tensor([0.5, float(torch.tensor([0.5, 2.0]).sigmoid().prod())]).double()
    labels = (torch.arange(rows)[:, None] < (chance * rows).round()).double()
    coarse = [0.5, 1.0, 2.0]
    temperatures = fit_temperatures(logits, labels, coarse, bins=1)
    assert temperatures[0] == 2.0  # as near to 0.5 as the grid gets
    options = {t: abs(float(confidence(logits, [2.0, t]).prod(1)[0] - chance[1])) for t in coarse}
    assert temperatures[1] == min(options, key=options.get) != 1.0


def test_ties_go_to_the_temperature_nearest_to_one():
    logits = torch.zeros(100, 1)  # sigmoid(0 / T) is the same for every T
    labels = (torch.arange(100)[:, None] < 30).double()
    assert fit_temperatures(logits, labels, GRID, 20) == [1.0]
    assert fit_temperatures(logits, labels, [0.25, 0.5, 4.0], 20) == [0.5]
    assert 1.0 in GRID and len(GRID) == 41
    assert (GRID[0], GRID[-1]) == pytest.approx((0.1, 10))


def test_labels_of_both_kinds_have_the_mean_of_survival():
    """Drafts of two slots over a vocabulary of two: what was kept before a slot changes its
    acceptance, so the product of acceptance rates is another quantity."""
    count, generator = 200_000, torch.Generator().manual_seed(0)
    first = (torch.rand(count, generator=generator) < 0.5).long()  # p = (1/2, 1/2)
    stays = torch.tensor([1.0, 0.2])[first]  # q = (0.9, 0.1)
    second = torch.tensor([0.9, 0.3])[first]  # acceptance of slot 1 after either token
    accept_rate = torch.stack([torch.full((count,), 0.6), second], dim=1)
    kept = torch.rand(count, 2, generator=generator) < torch.stack([stays, second], dim=1)
    records = synthetic_records(prompts=1, rounds=count, temperatures=[1.0, 1.0])
    records.accept_rate.copy_(accept_rate)
    records.accepted.copy_(kept.long().cumprod(dim=1).sum(dim=1))
    exact = 0.5 * 1.0 * 0.9 + 0.5 * 0.2 * 0.3
    spread = {}
    for kind in ("observed", "expected"):
        labels = survival_labels(records, kind)[:, 1]
        assert float(labels.mean()) == pytest.approx(exact, abs=0.005)
        spread[kind] = float(labels.std())
    assert spread["expected"] < spread["observed"]
    assert float(accept_rate.prod(dim=1).mean()) == pytest.approx(0.36, abs=0.005) != exact


def test_labels_of_slots_that_nobody_judged_are_unknown():
    records = synthetic_records(prompts=2, rounds=10, temperatures=[1.0] * 3, stop_every=4)
    judged, survived = records.judged(), records.survived()
    for kind in ("observed", "expected"):
        labels = survival_labels(records, kind)
        assert torch.equal(labels.isnan(), ~judged)
        reached = torch.cat([torch.ones(20, 1, dtype=torch.bool), survived[:, :-1]], dim=1)
        assert torch.equal(kept_labels(records, kind).isnan(), ~(judged & reached))
    records.accept_rate[0, 0] = math.nan
    assert torch.equal(survival_labels(records, "observed").isnan(), ~judged)
    with pytest.raises(ConfigError, match="1 of .* have none; use observed"):
        survival_labels(records, "expected")


def test_slots_without_two_outcomes_keep_temperature_one():
    records = synthetic_records(prompts=10, rounds=20, temperatures=[2.0] * 3)
    records.accepted.clamp_(max=1)  # nothing survives slot 1
    records.proposed.fill_(2)  # nobody saw slot 2
    result = calibrate(records, CalibrationSettings())
    assert result["temperatures"][1:] == [1.0, 1.0]
    after = result["survival"]["after"]
    assert after["rounds"][1:] == [100, 0]
    assert after["auc"][1:] == [None, None] and after["observed"][1:] == [0.0, None]
    assert after["ece"][1] > 0 and after["ece"][2] is after["noise_floor"][2] is None
    notes = "\n".join(result["notes"])
    assert "slot 1: no surviving drafts (100 rounds) in the part fitted on" in notes
    assert "slot 2: no known outcome in the part held out; it has no AUC" in notes


def test_the_split_keeps_prompts_together():
    records = synthetic_records(prompts=11, rounds=3, temperatures=[1.0])
    fit, held_out = split_by_prompt(records, 0.4, seed=0)
    prompts = set(fit.prompt.tolist()), set(held_out.prompt.tolist())
    assert len(prompts[0]) == 4 and len(fit) == 12 and not prompts[0] & prompts[1]
    assert torch.equal(split_by_prompt(records, 0.4, seed=0)[0].prompt, fit.prompt)
    assert set(split_by_prompt(records, 0.4, seed=1)[0].prompt.tolist()) != prompts[0]
    with pytest.raises(ConfigError, match="11 prompts must leave"):
        split_by_prompt(records, 0.01, seed=0)


def test_temperatures_are_of_the_fit_part_and_figures_of_the_other():
    settings = CalibrationSettings(fit_share=0.25)
    records = synthetic_records(prompts=20, rounds=30, temperatures=[1.5, 2.0])
    before = calibrate(records, settings)
    fit, _ = split_by_prompt(records, settings.fit_share, settings.seed)
    held_out = ~torch.isin(records.prompt, fit.prompt)
    records.accepted[held_out] = 2
    after = calibrate(records, settings)
    assert after["fit"] == {"prompts": 5, "rounds": 150}
    assert after["fitted_temperatures"][0] == before["fitted_temperatures"][0] != 1.0
    assert before["temperatures"][0] == before["fitted_temperatures"][0]
    # What nothing but the part fitted on speaks for is not used.
    assert after["temperatures"] == [1.0, 1.0] and "T = 1 is kept" in after["notes"][0]
    for name in ("survival", "confidence"):
        assert after[name]["after"]["observed"] == [1.0, 1.0] != before[name]["after"]["observed"]
    assert after["threshold_sweep"]["after"]["tau"][0] == 3.0


def saved(tmp_path, name, **changes):
    records = synthetic_records(prompts=3, rounds=2, temperatures=[1.0, 1.0], **changes)
    records.save(tmp_path / name)
    return tmp_path / name


def test_records_of_several_files_are_one(tmp_path):
    once = saved(tmp_path, "a", temperature=0.0)
    again = saved(tmp_path, "b", seed=1)
    others = saved(tmp_path, "c", prompt_files=["others.jsonl"])
    records = load_records([others, once, again])
    assert len(records) == 18 and len(records.prompt.unique()) == 6
    assert records.prompt[6:12].tolist() == records.prompt[12:].tolist()
    assert records.facts["temperature"] == [1.0, 0.0]
    assert records.facts["prompt_files"] == ["others.jsonl", "prompts.jsonl"]
    swapped = load_records([once, again, others])
    assert set(swapped.prompt[:6].tolist()) == set(records.prompt[6:12].tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iteration": 200}, "iteration is 200"),
        ({"target": "other"}, "target is 'other'"),
        ({"prompt_files": ["prompts.jsonl", "more.jsonl"]}, "prompt_files or none in common"),
    ],
)
def test_records_of_different_drafts_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_records([saved(tmp_path, "a"), saved(tmp_path, "b", **changes)])


def test_records_that_cannot_be_calibrated_are_refused(tmp_path):
    def edited(edit):
        records = synthetic_records(prompts=3, rounds=2, temperatures=[1.0, 1.0])
        edit(records)
        records.save(tmp_path / "drafts")
        return [tmp_path / "drafts"]

    def cut(records):
        records.accepted[0], records.proposed[0] = 0, 1

    for edit, message in (
        (lambda r: r.confidence_logits.fill_(math.nan), "without a confidence head"),
        (lambda r: r.confidence_logits[0].fill_(math.inf), "2 of .* that are not"),
        (cut, "1 of 6 that were cut"),
        (lambda r: r.facts.update(scheduler="early_stopping"), "scheduler: early_stopping"),
        (lambda r: r.facts.update(block_size=7), "the 7 draft tokens of its blocks, has 2"),
        (lambda r: r.facts.pop("prompt_files"), "lacks prompt_files"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_records(edited(edit))
    with pytest.raises(ConfigError, match="twice"):
        load_records([saved(tmp_path, "a")] * 2)


@pytest.mark.parametrize(
    "changes", [{"labels": "soft"}, {"bins": 1}, {"fit_share": 1.0}, {"widest_temperature": 1.0}]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        CalibrationSettings(**changes)


def test_the_sweep_equals_a_count_by_hand():
    records = synthetic_records(prompts=5, rounds=20, temperatures=[1.5] * 4, stop_every=7)
    temperatures = [2.0, 1.0, 0.5, 1.0]
    sweep = threshold_sweep(records, temperatures, [0.0, 0.6, 1.0])
    for i, threshold in enumerate(sweep["threshold"]):
        verified = accepted = gained = 0
        for logits, proposed, kept in zip(
            records.confidence_logits.tolist(), records.proposed, records.accepted, strict=True
        ):
            length = 0
            while length < 4 and (
                1 / (1 + math.exp(-logits[length] / temperatures[length])) >= threshold
            ):
                length += 1
            verified += min(length, int(proposed))
            accepted += min(length, int(kept))
            ended = length >= proposed == kept < 4
            gained += min(length, int(kept)) + (not ended)
        assert sweep["verified_tokens"][i] == verified
        assert sweep["accepted_tokens"][i] == accepted
        assert sweep["rejected_tokens"][i] == verified - accepted
        assert sweep["acceptance"][i] == (accepted / verified if verified else None)
        assert sweep["tau"][i] == pytest.approx(gained / 100)
    assert sweep["verified_tokens"][0] == int(records.proposed.sum())
    assert sweep["tau"][2] == 1.0
