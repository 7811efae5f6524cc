"""Seconds of a step, hours and price of a run, a store's break-even, by hand."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dspark_megatron.config import Config, TrainConfig
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.cost.machine import Machine
from dspark_megatron.planning.cost.rates import GPUS, Rates, rates_of
from dspark_megatron.planning.cost.run_cost import Bill, cost_lines, run_steps
from dspark_megatron.planning.cost.step_time import PartTime, StepTime, step_time
from dspark_megatron.planning.cost.store import StoreCost, store_cost, store_lines
from dspark_megatron.planning.observing.work import Sent, Work
from dspark_megatron.planning.target.target_pass import SHARDS
from dspark_megatron.planning.work import StepWork
from dspark_megatron.run.check import RunPlan

RATES = Rates(
    tflops=100, mfu=0.5, hbm=2, nvlink=400, network=40, transfer_share=0.5, latency_us=10, disk=8
)
"""5e13 FLOPs, 1e12 bytes of memory, 2e11 in a node and 2e10 between nodes, a second."""
MACHINE = Machine(gpus_per_node=8, nodes=2, gpu_memory_gib=80, rates=RATES)


def reduced(handed, *, size=8, span=8, calls=0, group="draft, tensor-parallel"):
    return Sent("all-reduce", group, size, span, handed, calls)


def time_of(machine=MACHINE, idle=0.0, **parts):
    return step_time(StepWork(parts), machine, idle=idle)


def test_a_part_takes_what_its_slower_side_takes():
    time = time_of(draft=Work(flops=10**14, moved=10**12), loss=Work(flops=10**12, moved=10**12))
    assert time.parts["draft"].compute == pytest.approx(2)
    assert time.parts["loss"].compute == pytest.approx(1)
    assert time.total == pytest.approx(3)


def test_what_stays_in_a_node_goes_by_nvlink_and_the_rest_by_network():
    """An all-reduce of 8 ranks sends 2 x 7/8 of what a rank hands over."""
    near, far = reduced(8 * 10**11), reduced(8 * 10**11, span=9)
    assert time_of(draft=Work(sent=(near,))).total == pytest.approx(2 * 7 / 8 * 8e11 / 2e11)
    assert time_of(draft=Work(sent=(far,))).total == pytest.approx(2 * 7 / 8 * 8e11 / 2e10)


def test_every_call_has_a_latency():
    assert time_of(draft=Work(sent=(reduced(0, calls=1000),))).total == pytest.approx(0.01)


def test_groups_are_shown_apart_and_their_kinds_together():
    sent = (reduced(10**11), Sent("all-gather", "draft, tensor-parallel", 8, 8, 10**11, 0))
    part = time_of(draft=Work(sent=(*sent, reduced(10**10, group="another")))).parts["draft"]
    assert part.sent == {
        "draft, tensor-parallel, 8 ranks": pytest.approx((1.75e11 + 7e11) / 2e11),
        "another, 8 ranks": pytest.approx(1.75e10 / 2e11),
    }


def gathered(seconds):
    """Weights that take so long between nodes."""
    return Sent("all-gather", SHARDS, 2, 16, int(seconds * 2e10), 0)


@pytest.mark.parametrize("seconds, hidden", [(3, 3), (7, 5)])
def test_sharded_weights_arrive_while_the_target_computes(seconds, hidden):
    work = {
        "target": Work(flops=5 * 5 * 10**13, sent=(gathered(seconds), reduced(2 * 10**11))),
        "draft": Work(flops=10**15),
    }
    time = time_of(**work)
    assert time.parts["target"].hidden == pytest.approx(hidden)
    assert time.parts["target"].total == pytest.approx(5 + 1.75 + seconds - hidden)
    slow = replace(MACHINE, rates=replace(RATES, overlap=False))
    assert time_of(slow, **work).parts["target"].total == pytest.approx(5 + 1.75 + seconds)


def test_a_pipeline_stage_waits_for_the_others_in_the_target_s_time():
    """Idle for a third of the time means half as long as it works."""
    work = {"target": Work(flops=10**14), "draft": Work(flops=10**14)}
    time = time_of(idle=1 / 3, **work)
    assert time.parts["target"].idle == pytest.approx(1)
    assert time.parts["draft"].idle == 0 and time.total == pytest.approx(5)


def test_stored_states_are_read_beside_the_step_and_count_where_they_take_longer():
    work = StepWork({"draft": Work(flops=10**14)})
    assert step_time(work, MACHINE, stored_bytes=8 * 10**9).total == pytest.approx(2)
    assert step_time(work, MACHINE, stored_bytes=40 * 10**9).total == pytest.approx(5)


def test_steps_are_those_that_the_run_takes():
    assert run_steps(TrainConfig(iterations=7), 100) == 7
    assert run_steps(TrainConfig(epochs=1.5, global_batch_size=10), 21) == 4
    assert run_steps(TrainConfig(epochs=1.5), None) is None


def plan_of(**train):
    config = Config(train=TrainConfig(global_batch_size=4, **train))
    config.data.max_length = 1000
    return RunPlan(config, None, None, 2)  # no size of a model is asked for


TIME = StepTime({"draft": PartTime(1.5, sent={"a group": 0.5})})


def test_hours_and_price_of_a_run():
    """4 x 1000 tokens in 2 seconds; 5,400 steps take 3 hours."""
    lines = cost_lines(plan_of(iterations=5400), TIME, Bill(price=2.5), gpus=16)
    assert lines == [
        "tokens a second: 2,000, 125 a GPU (samples of full length)",
        "hours of the run: 3.0 for 5,400 steps, 48 GPU-hours, 120 at 2.5 a GPU-hour",
    ]


def test_hours_of_epochs_need_the_samples():
    known = cost_lines(plan_of(epochs=2), TIME, Bill(samples=10_800), gpus=16)
    assert known[1] == "hours of the run: 3.0 for 5,400 steps, 48 GPU-hours"
    unknown = cost_lines(plan_of(epochs=2), TIME, Bill(price=1), gpus=16)
    assert "without its samples; 138.9 for a million of them once, 2,222 GPU-hours" in unknown[1]
    assert unknown[1].endswith("2,222 at 1 a GPU-hour")


@pytest.mark.parametrize(
    "passes, disk, reading, epochs",
    [(80, 20, 50, 3), (80, 10, 50, 2), (80, 20, 100, None), (80, 20, 120, None)],
)
def test_a_store_pays_from_the_epoch_on_that_makes_up_for_writing_it(passes, disk, reading, epochs):
    """Online an epoch takes 100 hours, so writing must be less than what the epochs gain."""
    hours = [3600 * value for value in (passes, disk, 100, reading)]
    cost = StoreCost(2**30, *hours)
    assert cost.break_even == epochs
    if epochs is not None:
        for count in (epochs - 1, epochs):
            stored = cost.writing + count * cost.reading
            assert (stored < count * cost.online) == (count == epochs)
    text = "\n".join(store_lines(cost, 1000, "TP 1 x DP 16", RATES))
    assert f"1.000 GiB in {passes + disk}.00 hours" in text
    assert ("never pays" in text) == (epochs is None)


def test_writing_and_reading_a_store_cost_what_their_steps_take():
    """Steps of 4 samples; a sample's 10 tokens have 3 states of 8 bf16 numbers, 6 bytes of ids and
    masks, and an entry of 56 bytes."""
    plan = plan_of(iterations=1)
    plan.config.data.max_length = 10
    plan = replace(plan, shape=SimpleNamespace(hidden_size=8, target_layer_ids=(0, 1)))
    online = StepTime({"target": PartTime(3, sent={"a group": 1}), "draft": PartTime(2)})
    cost = store_cost(plan, online, StepTime({"draft": PartTime(1.5)}), 1000, RATES)
    nbytes = 1000 * (10 * (3 * 8 * 2 + 6) + 56)
    assert cost == StoreCost(nbytes, 250 * 4, nbytes / 8e9, 250 * 6, 250 * 1.5)


def test_presets_are_the_data_sheets_and_give_way_to_what_is_given():
    assert rates_of("h100", {}) == Rates()
    b200 = rates_of("b200", {"tflops": 2000.0, "mfu": None, "nodes": 4})
    assert (b200.tflops, b200.mfu, b200.nvlink) == (2000, 0.4, 900)
    for gpu in GPUS.values():
        gpu.rates.validate()


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e-300, 1e300])
@pytest.mark.parametrize("name", ["tflops", "hbm", "nvlink", "network", "disk"])
def test_a_rate_must_be_above_zero(name, value):
    with pytest.raises(ConfigError, match=re.escape(f"{name} ({value:g}) must be > 0")):
        rates_of("h100", {name: value})


@pytest.mark.parametrize("value", [0, -0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["mfu", "transfer_share"])
def test_a_share_is_in_its_bounds(name, value):
    with pytest.raises(ConfigError, match=re.escape(f"{name} ({value:g}), the share")):
        rates_of("h100", {name: value})


def test_a_latency_may_be_zero_and_no_less():
    assert rates_of("h100", {"latency_us": 0.0}).latency_us == 0
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="latency_us .* must be >= 0"):
            rates_of("h100", {"latency_us": value})


def test_an_unknown_gpu_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match="the GPU .tpu. must be one of a100, h100, h200, b200"):
        rates_of("tpu", {})


@pytest.mark.parametrize(
    "bill, message",
    [
        (Bill(samples=0), r"samples \(0\) must be >= 1"),
        (Bill(samples=10**400), "at most 1,000,000,000,000"),
        (Bill(price=0.0), r"price_per_gpu_hour \(0\) must be > 0"),
        (Bill(price=float("nan")), r"price_per_gpu_hour \(nan\) must be > 0"),
    ],
)
def test_a_bill_that_cannot_be(bill, message):
    with pytest.raises(ConfigError, match=message):
        bill.validate()
