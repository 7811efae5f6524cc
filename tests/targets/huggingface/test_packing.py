"""Samples packed into rows of the target's forward pass: the same states, and none leaks."""

import json

import pytest
import torch
import transformers

from dspark_megatron.config import TargetConfig
from dspark_megatron.data.batch import Batch
from dspark_megatron.data.sampler import StepSampler, global_batch
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.check import check
from dspark_megatron.targets.base import TargetStates
from dspark_megatron.targets.huggingface.packing import SequencePacker
from dspark_megatron.training.padding import describe_padding
from support.target_families import SIZES, make_family, make_multimodal, save_target
from support.tiny_target import make_target, tiny_config
from support.training_runs import assert_same_curve, curve, run_training

LENGTHS = [12, 3, 7, 1, 8]
DRAFT = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8, ffn_hidden_size=48)


def planner(**settings):
    return SequencePacker.of(TargetConfig(path="x", **settings), hidden_size=64)


def samples():
    """[b, s] tokens, right-padded with a token that occurs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(40, 280, (len(LENGTHS), max(LENGTHS)), generator=generator)
    for row, length in zip(ids, LENGTHS, strict=True):
        row[length:] = 0
    return ids


# Rows


def test_every_sample_is_in_one_row():
    for most in (None, 5, 12, 20):
        for attention in ("sdpa", "flash_attention_2"):
            groups = planner(max_tokens_per_forward=most, attention=attention).groups(LENGTHS)
            rows = [row for group in groups for row in group.samples]
            assert sorted(i for row in rows for i in row) == list(range(5))
            for group in groups:
                assert group.width == max(sum(LENGTHS[i] for i in row) for row in group.samples)
                assert most is None or group.positions <= most or group.max_tokens == most
                assert attention == "sdpa" or len(group.samples) == 1


def test_short_samples_share_a_row_and_long_ones_a_pass():
    """Below some h tokens padding costs more than attention, far above less."""
    [one] = planner().groups([30, 10, 20, 5])
    assert (one.samples, one.width) == ([[0, 2, 1, 3]], 65)
    [four] = planner().groups([1000, 990, 1000, 980])
    assert (len(four.samples), four.width) == (4, 1000)
    [flash] = planner(attention="flash_attention_2").groups([1000, 990, 1000, 980])
    assert (len(flash.samples), flash.width) == (1, 3970)


# States


def gemma(folder):
    config = transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4)
    return save_target(folder, transformers.Gemma3ForCausalLM(config))


def mistral(folder):
    config = transformers.MistralConfig(**SIZES, head_dim=8, sliding_window=4)
    return save_target(folder, transformers.MistralForCausalLM(config))


TARGETS = {
    "qwen3": make_target,
    "llama": lambda folder: make_target(folder, model_type="llama"),
    "sliding window": mistral,
    "every other layer slides": gemma,
    "experts": lambda folder: make_family(folder, "qwen3_moe"),
    "latent attention": lambda folder: make_family(folder, "deepseek_v3"),
    "images": lambda folder: make_multimodal(folder, "qwen3_vl"),
}


def states_of(runtime, config, ids, lengths, one_row=False):
    """Packed; the shape of every pass; then of each sample alone."""
    from dspark_megatron.run.build import build_target
    from dspark_megatron.run.check import check
    from dspark_megatron.targets.huggingface.packing import PackedSequences

    target, shapes = build_target(check(config, runtime.world_size), runtime), []
    target.model.register_forward_pre_hook(
        lambda _module, _inputs, arguments: shapes.append(tuple(arguments["input_ids"].shape)),
        with_kwargs=True,
    )
    if one_row:
        groups = [PackedSequences([list(range(len(lengths)))], sum(lengths))]
        packed = target.packed_states(Batch(ids, lengths), groups)
    else:
        packed = target.states(Batch(ids, lengths))
    passes = list(shapes)
    alone = [target.states(Batch(ids[i : i + 1, :n])) for i, n in enumerate(lengths)]
    return packed, passes, alone


def config_of(tiny_run, path, **settings):
    target = {"path": str(path), "packing": True, **settings}
    return tiny_config(tiny_run, target=target, model=DRAFT, train={"micro_batch_size": 4})


def assert_equal_states(packed, alone, lengths):
    for i, (states, length) in enumerate(zip(alone, lengths, strict=True)):
        for got, own in (
            (packed.taps, states.taps),
            (packed.last_hidden, states.last_hidden),
        ):
            torch.testing.assert_close(got[i, :length], own[0], rtol=1e-4, atol=1e-5)
            assert not got[i, length:].any()


@pytest.mark.parametrize("kind", TARGETS)
def test_states_are_those_of_each_sample_alone(pool, tiny_run, tmp_path, kind):
    path = TARGETS[kind](tmp_path / "target")
    shapes = {None: [(2, 16)], 10: [(1, 10), (1, 2), (1, 9), (1, 10)]}
    for most, expected in shapes.items():
        config = config_of(tiny_run, path, max_tokens_per_forward=most)
        arguments = dict(config=config, ids=samples(), lengths=LENGTHS)
        [(packed, passes, alone)] = pool.run(states_of, world=1, tp=1, **arguments)
        assert passes == expected
        assert_equal_states(packed, alone, LENGTHS)


@pytest.mark.parametrize("rows", ["one row", "side by side"])
def test_a_token_of_one_sample_changes_nothing_in_another(pool, tiny_run, tmp_path, rows):
    config = config_of(tiny_run, mistral(tmp_path / "target"))
    ids, one_row = samples(), rows == "one row"
    arguments = dict(config=config, lengths=LENGTHS, one_row=one_row)
    [(before, passes, alone)] = pool.run(states_of, world=1, tp=1, ids=ids, **arguments)
    assert passes == [(1, sum(LENGTHS)) if one_row else (2, 16)]
    assert_equal_states(before, alone, LENGTHS)
    ids[0, 0] += 1
    [(after, _, _)] = pool.run(states_of, world=1, tp=1, ids=ids, **arguments)
    changed = (after.taps != before.taps).flatten(1).any(dim=1)
    assert changed.tolist() == [True, False, False, False, False]


def states_of_own(runtime, config, every):
    """Packed, of other samples on each data-parallel rank, and which."""
    from dspark_megatron.run.build import build_target
    from dspark_megatron.run.check import check

    target = build_target(check(config, runtime.world_size), runtime)
    own = every[runtime.dp_group.rank() % len(every)]
    lengths = [LENGTHS[i] for i in own]
    return target.states(Batch(samples()[own, : max(lengths)], lengths)), own


def states_alone(model, sample):
    """Of the tiny runs' target layers, by Transformers' own model."""
    with torch.no_grad():
        own = model(samples()[sample, None, : LENGTHS[sample]], output_hidden_states=True)
    hidden = own.hidden_states
    return TargetStates(torch.cat([hidden[1], hidden[3]], dim=-1), hidden[-1])


# World size, tensor-parallel size, target.shard_across_data_parallel, expert parallel.
LAYOUTS = [(2, 2, 1, 1), (2, 1, 2, 2), (4, 2, 2, 4)]


@pytest.mark.parametrize("most", [None, 10])
@pytest.mark.parametrize("world, tp, shards, ep", LAYOUTS)
def test_ranks_that_share_the_target_stay_in_step(
    pool, tiny_run, tmp_path, world, tp, shards, ep, most
):
    """Ranks with other numbers of samples, and one with a single one, which is not packed."""
    path = make_family(tmp_path / "target", "qwen3_moe")
    config = config_of(
        tiny_run, path, shard_across_data_parallel=shards, max_tokens_per_forward=most
    )
    config.parallel.tensor_parallel, config.parallel.expert_parallel = tp, ep
    every = [[0, 1, 2, 3, 4], [0]]
    ranks = pool.run(states_of_own, world=world, tp=tp, config=config, every=every)
    model = transformers.AutoModel.from_pretrained(path)
    for packed, own in ranks:
        alone = [states_alone(model, sample) for sample in own]
        assert_equal_states(packed, alone, [LENGTHS[i] for i in own])
    assert ranks[0][0].positions == (32 if most is None else 12 + 9 + 10)


# Runs


def trained(pool, tiny_run, output, world, tp, micro_batch_size=2, **sections):
    train = {"output_dir": str(output), "micro_batch_size": micro_batch_size, "iterations": 6}
    sections = {"parallel": {"tensor_parallel": tp}, **sections}
    sections["target"] = {"samples_per_pass": micro_batch_size, **sections.get("target", {})}
    sections["train"] = {**train, **sections.get("train", {})}
    config = tiny_config(tiny_run, **sections)
    pool.run(run_training, world=world, tp=tp, config=config)
    return curve(output)


PACKED = {"target": {"packing": True}}
GROUPED = {"data": {"group_by_length": True}}
REMEDIES = [
    (1, 1, 2, PACKED),
    (2, 2, 2, PACKED),
    (2, 1, 2, {**PACKED, **GROUPED}),
    (4, 2, 2, {"target": {"packing": True, "shard_across_data_parallel": 2}}),
    (1, 1, 2, GROUPED),
    (2, 1, 1, GROUPED),
]


@pytest.fixture(scope="module")
def padded(pool, tiny_run, tmp_path_factory):
    return trained(pool, tiny_run, tmp_path_factory.mktemp("padded"), 1, 1, 4)


@pytest.mark.parametrize("world, tp, micro_batch_size, sections", REMEDIES)
def test_the_curve_is_the_same(
    pool, tiny_run, padded, tmp_path, world, tp, micro_batch_size, sections
):
    rows = trained(pool, tiny_run, tmp_path, world, tp, micro_batch_size, **sections)
    assert_same_curve(rows, padded)
    share = "sampler/padding_share"
    assert sum(row[share] for row in rows) < 0.7 * sum(row[share] for row in padded)


def linear_attention(folder):
    """Its state goes on from one sample to the next."""
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8)
    linear.update(linear_value_head_dim=8, shared_expert_intermediate_size=16)
    config = transformers.Qwen3NextConfig(**SIZES, **experts, **linear, head_dim=8)
    torch.manual_seed(0)
    return save_target(folder, transformers.Qwen3NextForCausalLM(config))


LEAKS = {
    "qwen3_next": (linear_attention, "sdpa"),
    "gpt_oss": (lambda folder: make_family(folder, "gpt_oss"), "eager"),
}
"""GPT-OSS: Transformers 5.23 does not tell its masks where samples begin."""


@pytest.mark.parametrize("family", LEAKS)
def test_a_family_that_does_not_keep_samples_apart_is_refused(pool, tiny_run, tmp_path, family):
    make, attention = LEAKS[family]
    target = {"path": str(make(tmp_path / "target")), "attention": attention, "packing": True}
    with pytest.raises(AssertionError, match=rf"\({family}\) does not keep .*packing=false"):
        trained(pool, tiny_run, tmp_path / "run", 1, 1, target=target, model=DRAFT)


def test_one_sample_a_pass_is_not_packed(tiny_run):
    with pytest.raises(ConfigError, match=r"samples_per_pass \(1\) has one"):
        tiny_config(tiny_run, target={"packing": True, "samples_per_pass": 1})


def test_grouping_needs_a_loss_that_does_not_depend_on_it(tiny_run):
    with pytest.raises(ConfigError, match="group_by_length changes .*'deepspec'"):
        tiny_config(tiny_run, loss={"normalization": "deepspec"}, **GROUPED)
    tiny_config(tiny_run, loss={"normalization": "global_samples"}, **GROUPED)


# Grouping and what is said of it


@pytest.mark.parametrize("dp_size, micro_batch_size", [(1, 4), (2, 2), (4, 1)])
def test_a_grouped_step_has_the_same_samples(dp_size, micro_batch_size):
    lengths = torch.tensor([5, 30, 5, 12, 7, 30, 9, 1, 2, 3, 4])
    for consumed in (0, 8, 16):
        step = {}
        for rank in range(dp_size):
            sampler = StepSampler(11, 3, 8, micro_batch_size, rank, dp_size, lengths=lengths)
            for j, batch in enumerate(sampler.micro_batches(consumed)):
                step[j, rank] = batch
        dealt = [ref for place in sorted(step) for ref in step[place]]
        assert sorted(dealt) == sorted(global_batch(consumed, 8, 11, 3))
        order = [int(lengths[ref.sample_index]) for ref in dealt]
        assert order == sorted(order, reverse=True)


def test_padding_is_said_before_the_run(tiny_run):
    def said(samples, size, **sections):
        sections["target"] = {"samples_per_pass": samples, **sections.get("target", {})}
        train = {"micro_batch_size": size, "global_batch_size": 4}
        plan = check(tiny_config(tiny_run, train=train, **sections), 1)
        return describe_padding(plan, torch.tensor([10, 10, 6, 6]), None, 7)

    text = said(2, 2, **GROUPED)
    assert text.startswith("padding: 0.0% of the positions")
    assert "first 7 steps" in text and "with both 0.0%" in text
    assert "as the samples come 0.0%" not in text
    assert said(1, 1, **GROUPED) is None
    # Micro-batches of other lengths are not padded to the longest of them, unless they must be.
    assert said(4, 2, **GROUPED) == text
    assert said(4, 1).startswith("padding: 0.0%")
    sharded = {"shard_across_data_parallel": 0}
    assert said(4, 1, target=sharded).startswith("padding: 0.0%"), "one rank shares with nobody"


# Long samples


def test_a_sample_of_32k_tokens_trains(pool, tiny_run, tmp_path):
    """Through the target in pieces of 1,024, beside a short one that is packed with nothing."""
    data = tmp_path / "long.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for length in (32768, 50):
            ids = [40 + i % 200 for i in range(length)]
            file.write(json.dumps({"input_ids": ids, "loss_mask": [1] * length}) + "\n")
    path = mistral(tmp_path / "target")
    rows = trained(
        pool,
        tiny_run,
        tmp_path / "run",
        1,
        1,
        target={"path": str(path), "packing": True, "max_tokens_per_forward": 1024},
        data={"train_files": [str(data)], "max_length": 32768},
        train={"global_batch_size": 2, "iterations": 1},
    )
    assert rows[0]["loss"] > 0 and rows[0]["sampler/anchors_per_sample"] == 6
    assert rows[0]["sampler/padding_share"] == 0
