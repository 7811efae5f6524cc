"""A target that takes its tokens in several passes gives the same states."""

import pytest
import torch
import transformers

from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import ConfigError
from support.sharded_targets import own_states
from support.target_families import SIZES, make_family, make_multimodal, save_target
from support.tiny_target import make_target, tiny_config
from support.training_runs import assert_same_curve, curve, run_training

IDS = torch.arange(36).view(3, 12) + 40


def passes(runtime, config):
    """States of IDS and the shape of every forward pass."""
    from dspark_megatron.run.build import build_target
    from dspark_megatron.run.check import check

    target, shapes = build_target(check(config, runtime.world_size), runtime), []
    target.model.register_forward_pre_hook(
        lambda _module, _inputs, arguments: shapes.append(tuple(arguments["input_ids"].shape)),
        with_kwargs=True,
    )
    states = target.states(Batch(IDS))
    return states.taps, states.last_hidden, shapes


def mistral(folder):
    config = transformers.MistralConfig(**SIZES, head_dim=8, sliding_window=5)
    return save_target(folder, transformers.MistralForCausalLM(config))


TARGETS = {
    "qwen3": make_target,
    "sliding window": mistral,
    "experts": lambda folder: make_family(folder, "qwen3_moe"),
    "latent attention": lambda folder: make_family(folder, "deepseek_v3"),
    "images": lambda folder: make_multimodal(folder, "qwen3_vl"),
}
DRAFT = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
EXPECTED = {
    1000: [(3, 12)],
    35: [(2, 12), (1, 12)],
    12: [(1, 12)] * 3,
    5: [(1, 5), (1, 5), (1, 2)] * 3,
}
"""Passes by the number of tokens they may have."""


@pytest.mark.parametrize("kind", TARGETS)
def test_states_are_those_of_one_pass(pool, tiny_run, tmp_path, kind):
    path = TARGETS[kind](tmp_path / "target")

    def run(most):
        target = {"path": str(path), "max_tokens_per_forward": most}
        config = tiny_config(tiny_run, target=target, model=DRAFT)
        return pool.run(passes, world=1, tp=1, config=config)[0]

    taps, last_hidden, _ = run(None)
    for most, shapes in EXPECTED.items():
        part = run(most)
        assert part[2] == shapes
        torch.testing.assert_close(part[0], taps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part[1], last_hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_last_hidden", [True, False])
@pytest.mark.parametrize("world, tp, shards, ep", [(2, 1, 2, 2), (4, 1, 2, 1), (4, 2, 2, 4)])
def test_ranks_that_share_the_target_make_equally_many(
    pool, tiny_run, tmp_path, world, tp, shards, ep, with_last_hidden
):
    """Sequences of 7, 8, ... tokens: one pass on the first rank, two on its neighbour."""
    from transformers import AutoModel

    path = make_family(tmp_path / "target", "qwen3_moe")
    target = {"shard_across_data_parallel": shards, "max_tokens_per_forward": 7}
    config = tiny_config(
        tiny_run,
        target={"path": str(path), **target},
        parallel={"tensor_parallel": tp, "expert_parallel": ep},
    )
    model = AutoModel.from_pretrained(path)
    ranks = pool.run(
        own_states, world=world, tp=tp, config=config, with_last_hidden=with_last_hidden
    )
    for ids, taps, last_hidden, _, _ in ranks:
        with torch.no_grad():
            own = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(taps, torch.cat([own[1], own[3]], -1), rtol=1e-4, atol=1e-5)
        assert (last_hidden is not None) == with_last_hidden
        if with_last_hidden:
            torch.testing.assert_close(last_hidden, own[-1], rtol=1e-4, atol=1e-5)


def test_the_curve_is_the_same(pool, tiny_run, tmp_path):
    def trained(name, world, tp, **target):
        train = {"output_dir": str(tmp_path / name), "iterations": 6}
        parallel = {"tensor_parallel": tp}
        config = tiny_config(tiny_run, target=target, train=train, parallel=parallel)
        pool.run(run_training, world=world, tp=tp, config=config)
        return curve(tmp_path / name)

    whole = trained("whole", 1, 1)
    pieces = {"shard_across_data_parallel": 2, "max_tokens_per_forward": 10}
    assert_same_curve(trained("pieces", 4, 2, **pieces), whole)


def test_no_tokens_at_all_are_refused(tiny_run):
    with pytest.raises(ConfigError, match="max_tokens_per_forward"):
        tiny_config(tiny_run, target={"max_tokens_per_forward": 0})
