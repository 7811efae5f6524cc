"""The target takes several micro-batches at once, and the draft learns the same."""

import gc
import weakref
from functools import partial

import pytest
import torch

from dspark_megatron.config.loading import load_config
from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.work import step_work
from dspark_megatron.run.check import check
from dspark_megatron.targets.base import Target, TargetStates
from dspark_megatron.targets.shared_pass import SharedPasses, alike
from support.paths import PUBLIC_CONFIGS, ROOT
from support.sharded_targets import train_counting_passes, train_with_idle_micro_batches
from support.tiny_target import tiny_config
from support.training_runs import assert_same_curve, curve, run_training

CPU = torch.device("cpu")


class Echo(Target):
    """Its states of a token are the token itself; those of padding are 0."""

    device, dtype = CPU, torch.float32

    def __init__(self, lockstep=False, positions=None):
        self.lockstep, self.positions, self.shapes = lockstep, positions, []

    def states(self, batch):
        self.shapes.append(tuple(batch.input_ids.shape))
        taps = batch.input_ids[..., None].float()
        positions = self.positions or batch.input_ids.numel()
        return TargetStates(taps, -taps, positions=positions)


def batch_of(*lengths, start=0):
    samples = [torch.arange(1, n + 1) + 100 * (start + i) for i, n in enumerate(lengths)]
    ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    return Batch(ids, list(lengths), tuple(range(start, start + len(lengths))))


BATCHES = [
    batch_of(5, 9),
    batch_of(10, 2, start=2),
    batch_of(3, 3, start=4),
    batch_of(9, 9, start=6),
]


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 9])
def test_each_micro_batch_gets_its_own_states(micro_batches, lockstep):
    target = Echo(lockstep)
    shared = SharedPasses(target, micro_batches)
    for _ in range(2):
        shared.expect(BATCHES)
        for batch in BATCHES:
            states = shared.states(batch)
            assert torch.equal(states.taps[..., 0], batch.input_ids.float())
            assert torch.equal(states.hidden, -states.taps)
    if lockstep:
        assert len(target.shapes) == 2 * -(-len(BATCHES) // micro_batches)


def test_micro_batches_of_other_lengths_are_not_padded_to_the_longest_but_in_lockstep():
    for lockstep, shapes in ((False, [(6, 10), (2, 3)]), (True, [(8, 10)])):
        target = Echo(lockstep)
        shared = SharedPasses(target, 4)
        shared.expect(BATCHES)
        states = [shared.states(batch) for batch in BATCHES]
        assert target.shapes == shapes
        assert sum(one.positions for one in states) == sum(b * s for b, s in shapes)


def test_positions_of_a_packed_pass_are_shared_out_whole():
    shared = SharedPasses(Echo(positions=101), 4, packs=True)
    shared.expect(BATCHES[:3])
    found = [shared.states(batch).positions for batch in BATCHES[:3]]
    assert sum(found) == 101 and max(found) - min(found) <= 1


def test_alike_adds_a_tenth_of_padding_at_most():
    assert alike([7]) == [[0]] and alike([]) == []
    assert alike([100, 10, 95, 11]) == [[0, 2], [3, 1]]
    lengths = torch.randint(1, 4096, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    runs = alike(lengths)
    assert sorted(sum(runs, [])) == list(range(300)) and len(runs) < 60
    for run in runs:
        own = [lengths[place] for place in run]
        assert len(own) * max(own) <= 1.1 * sum(own)


def test_states_are_free_once_they_are_used():
    shared = SharedPasses(Echo(), 4, packs=True)
    shared.expect(BATCHES)
    first = shared.states(BATCHES[0])
    kept = weakref.ref(first.taps)
    waiting = sum(states.taps.untyped_storage().nbytes() for _, states in shared._waiting)
    assert waiting == sum(4 * batch.input_ids.numel() for batch in BATCHES[1:])
    del first
    gc.collect()
    assert kept() is None


def test_another_order_than_announced_is_a_mistake():
    shared = SharedPasses(Echo(), 4)
    shared.expect(BATCHES)
    with pytest.raises(AssertionError, match="another order"):
        shared.states(BATCHES[1])


def test_samples_nobody_announced_have_a_pass_of_their_own():
    target = Echo()
    shared = SharedPasses(target, 4)
    assert torch.equal(shared.states(BATCHES[0]).taps[..., 0], BATCHES[0].input_ids.float())
    shared.expect(BATCHES[:2])  # of a step that is cut short
    shared.states(BATCHES[0])
    shared.expect(BATCHES[2:])
    assert torch.equal(shared.states(BATCHES[2]).taps[..., 0], BATCHES[2].input_ids.float())


def pass_size(settings, world=1, **sections):
    return check(tiny_config(settings, **sections), world).pass_size


STATES = 48 * 32 * 4 * 3
"""Bytes of a sample of 48 tokens: two taps and the last hidden state, 32 fp32 numbers each."""


@pytest.mark.parametrize(
    "world, batch, target, micro_batches",
    [
        (1, (1, 64), {"samples_per_pass": 8}, 8),
        (1, (4, 64), {"samples_per_pass": 8}, 2),
        (1, (4, 64), {"samples_per_pass": 11}, 2),
        (1, (1, 4), {"samples_per_pass": 8}, 4),
        (2, (1, 4), {"samples_per_pass": 8}, 2),
        (1, (1, 12), {"samples_per_pass": 9}, 6),  # no fewer passes than of nine and three
        (1, (1, 4), {}, 4),
        (1, (1, 64), {"pass_memory_gib": 7.9 * 2 * STATES / 2**30}, 7),
        (1, (2, 64), {"pass_memory_gib": 7.9 * 2 * STATES / 2**30}, 3),
        (1, (1, 64), {"pass_memory_gib": 1e-9}, 1),
        (1, (1, 64), {"max_tokens_per_forward": 100}, 2),
        (1, (1, 64), {"max_tokens_per_forward": 10}, 1),
        (1, (1, 64), {"max_tokens_per_forward": 10, "samples_per_pass": 8}, 8),
    ],
)
def test_the_size_of_a_pass(tiny_run, world, batch, target, micro_batches):
    train = dict(zip(("micro_batch_size", "global_batch_size"), batch, strict=True))
    size = pass_size(tiny_run, world, target=target, train=train)
    assert size.micro_batches == micro_batches
    assert size.samples == micro_batches * batch[0]
    assert size.waiting_bytes() == size.samples * STATES


def test_nothing_shares_a_pass_where_there_is_none(tiny_run, tmp_path):
    stored = {"provider": "cache", "cache": str(tmp_path)}
    assert pass_size(tiny_run, target=stored).micro_batches == 1
    staged = {"target": {"provider": "megatron"}, "parallel": {"pipeline_parallel": 2}}
    assert pass_size(tiny_run, 2, **staged).micro_batches == 1


REFUSED = [
    ({"target": {"samples_per_pass": 0}}, "samples_per_pass .0. must be > 0"),
    ({"target": {"pass_memory_gib": 0}}, "pass_memory_gib .0.0. must be > 0"),
    ({"target": {"pass_memory_gib": 1e300}}, "pass_memory_gib .* must be at most"),
    (
        {"target": {"samples_per_pass": 3}, "train": {"micro_batch_size": 4}},
        r"samples_per_pass \(3\) must hold a micro-batch: .*micro_batch_size \(4\)",
    ),
    (
        {"target": {"provider": "cache", "cache": "x", "samples_per_pass": 2}},
        "makes none; set target.samples_per_pass=null",
    ),
    (
        {
            "target": {"provider": "megatron", "samples_per_pass": 2},
            "parallel": {"pipeline_parallel": 2},
        },
        "samples_per_pass .2. must be null .*pipeline_micro_batches",
    ),
]


@pytest.mark.parametrize("sections, message", REFUSED)
def test_settings_that_cannot_work(tiny_run, sections, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_run, **sections)


@pytest.fixture(scope="module")
def trained(pool, tiny_run, tmp_path_factory):
    def trained(world, tp, *, function=run_training, **sections):
        output = tmp_path_factory.mktemp("run")
        train = {"output_dir": str(output), "iterations": 3, "global_batch_size": 16}
        sections["train"] = {**train, **sections.get("train", {})}
        parallel = {"tensor_parallel": tp, **sections.pop("parallel", {})}
        config = tiny_config(tiny_run, parallel=parallel, **sections)
        answers = pool.run(function, world=world, tp=tp, config=config)
        return curve(output), answers

    return trained


@pytest.fixture(scope="module")
def one_by_one(trained):
    return trained(1, 1, target={"samples_per_pass": 1})[0]


RUNS = [
    (1, 1, 1, {"samples_per_pass": 5}),
    (1, 1, 2, {"packing": True, "max_tokens_per_forward": 40, "samples_per_pass": 8}),
    (2, 2, 2, {"provider": "megatron", "samples_per_pass": 8}),
    (4, 2, 1, {"shard_across_data_parallel": 2, "samples_per_pass": 8}),
    (
        4,
        2,
        2,
        {"shard_across_data_parallel": 2, "samples_per_pass": 8, "max_tokens_per_forward": 50},
    ),
]


@pytest.mark.parametrize("world, tp, size, target", RUNS)
def test_the_curve_is_the_same(trained, one_by_one, world, tp, size, target):
    rows, _ = trained(world, tp, target=target, train={"micro_batch_size": size})
    assert_same_curve(rows, one_by_one)


def test_micro_batches_that_teach_nothing(trained):
    """Ranks that share the target take part with them, others leave them out."""
    idle = partial(trained, function=train_with_idle_micro_batches)
    alone, _ = idle(1, 1, target={"samples_per_pass": 1})
    for shards in (1, 2):
        target = {"samples_per_pass": 3, "shard_across_data_parallel": shards}
        assert_same_curve(idle(2, 1, target=target)[0], alone)


def test_a_sharded_target_is_gathered_once_for_eight_samples(trained, one_by_one):
    """Counted in the second of three steps: what is gathered once and stays is no part of it."""
    found = {}
    for samples in (1, 8):
        target = {
            "shard_across_data_parallel": 2,
            "samples_per_pass": samples,
            "check_logits": False,
        }
        rows, ranks = trained(2, 1, function=train_counting_passes, target=target)
        assert_same_curve(rows, one_by_one)
        for passes in ranks:
            assert len(passes) == 3 * 8 // samples
            assert {shape[0] for shape, _ in passes} == {samples}
        found[samples] = [
            [sum(sent for _, sent in passes[len(passes) // 3 : 2 * len(passes) // 3])]
            for passes in ranks
        ]
    for [many], [once] in zip(found[1], found[8], strict=True):
        assert once > 0 and many >= 8 * once


def test_a_last_pass_of_fewer_samples_is_planned_with_those(tiny_run):
    """Five samples of a step: three go through together, and then two."""

    def work(most):
        config = tiny_config(
            tiny_run,
            target={"samples_per_pass": most},
            train={"micro_batch_size": 1, "global_batch_size": 5},
        )
        return step_work(check(config, 1, use="plan")).parts["target"]

    assert work(4).flops == work(1).flops > 0
    assert work(4).moved < work(1).moved


def test_the_recipe_for_405b_gathers_an_eighth():
    """By its plan, on 32 GPUs."""

    def gathered(*overrides):
        path = PUBLIC_CONFIGS / "llama-3.1-405b"
        config = load_config(
            ROOT / "examples/llama-3.1-405b.yaml", [f"target.path={path}", *overrides]
        )
        sent = step_work(check(config, 32, use="plan")).parts["target"].sent
        return sum(one.handed for one in sent if one.group.startswith("target's weights"))

    assert 0 < 8 * gathered() <= gathered("target.samples_per_pass=1")
