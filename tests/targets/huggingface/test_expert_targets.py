"""Targets with experts: the same states, curve and memory however the experts are spread."""

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.target.rank_model import target_bytes
from dspark_megatron.run.check import check
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.huggingface.split import TargetSplit
from support.sharded_targets import own_states
from support.target_families import make_family
from support.target_states import tapped
from support.tiny_target import make_target, tiny_config
from support.training_runs import assert_same_curve, curve, run_training

ONE_RANK = (1, 1, 1, 1)
"""World size, tensor parallel, data-parallel ranks that share the target, expert parallel."""
LAYOUTS = [
    (2, 2, 1, 1),
    (2, 2, 1, 2),
    (4, 2, 1, 2),
    (2, 1, 2, 2),
    (4, 1, 4, 2),
    (4, 1, 2, 2),
    (4, 2, 2, 1),
    (4, 2, 2, 2),
    (4, 2, 2, 4),
]
CASES = [("qwen3_moe", *layout) for layout in LAYOUTS]
CASES += [
    (family, *layout)
    for family in ("mixtral", "olmoe", "deepseek_v2", "deepseek_v3")
    for layout in (LAYOUTS[0], LAYOUTS[1], LAYOUTS[-1])
]
CASES += [("gpt_oss", *ONE_RANK), ("gpt_oss", 2, 1, 2, 2)]
DRAFT = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8, ffn_hidden_size=48)
"""What some families leave to the user."""
ATTENTION = {"gpt_oss": "eager"}
"""Where a family has no `sdpa`."""


def config_of(tiny_run, path, tp, shards, ep, *, attention="sdpa", **sections):
    target = {"path": str(path), "attention": attention, "shard_across_data_parallel": shards}
    parallel = {"tensor_parallel": tp, "expert_parallel": ep}
    return tiny_config(tiny_run, target=target, parallel=parallel, **sections)


@pytest.fixture(scope="module")
def moe_target(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("moe") / "target", "qwen3_moe")


@pytest.mark.parametrize("family, world, tp, shards, ep", CASES)
def test_states_and_memory(pool, tiny_run, tmp_path, family, world, tp, shards, ep):
    """Data-parallel ranks ask for other sequences, of other lengths."""
    from transformers import AutoModel

    path = make_family(tmp_path / "target", family)
    attention = ATTENTION.get(family, "sdpa")
    config = config_of(tiny_run, path, tp, shards, ep, attention=attention, model=DRAFT)
    ranks = pool.run(own_states, world=world, tp=tp, config=config, with_last_hidden=True)
    model = AutoModel.from_pretrained(path, attn_implementation=attention)
    for ids, taps, last_hidden, _, _ in ranks:
        with torch.no_grad():
            own = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(taps, torch.cat([own[1], own[3]], -1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last_hidden, own[-1], rtol=1e-4, atol=1e-5)
    split = TargetSplit(tp, world // tp, shards, ep)
    planned = target_bytes(load_target_config(path), torch.float32, split) / 4
    assert max(rank[3] for rank in ranks) == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("ep", [1, 2])
def test_states_with_a_key_value_cache_and_logits(pool, tiny_run, moe_target, ep):
    config = config_of(tiny_run, moe_target, 2, 1, ep)
    for taps, _, cached, _, _ in pool.run(tapped, world=2, tp=2, config=config):
        torch.testing.assert_close(cached, taps, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def whole_curve(pool, tiny_run, moe_target, tmp_path_factory):
    return trained(pool, tiny_run, moe_target, tmp_path_factory.mktemp("whole"), *ONE_RANK)


def trained(pool, tiny_run, target, output, world, tp, shards, ep):
    train = {"output_dir": str(output), "iterations": 8}
    config = config_of(tiny_run, target, tp, shards, ep, train=train)
    pool.run(run_training, world=world, tp=tp, config=config)
    return curve(output)


@pytest.mark.parametrize("layout", [(2, 2, 1, 1), (2, 2, 1, 2), (2, 1, 2, 2), (4, 2, 2, 4)])
def test_the_curve_is_the_same(pool, tiny_run, moe_target, whole_curve, tmp_path, layout):
    assert_same_curve(trained(pool, tiny_run, moe_target, tmp_path, *layout), whole_curve)


BAD = {
    "not a multiple of TP": ((4, 2, 2, 1), 3, "(3) must be a multiple", "[1, 2, 4]"),
    "more than the sharing ranks": ((4, 1, 2, 1), 4, "divides", "[1, 2]"),
    "more ranks than one copy has": ((4, 1, 1, 1), 2, "shard_across_data_parallel 1", "[1]"),
}


@pytest.mark.parametrize("case", BAD)
def test_sizes_that_cannot_work(tiny_run, moe_target, case):
    (world, tp, shards, _), ep, *words = BAD[case]
    with pytest.raises(ConfigError) as error:
        check(config_of(tiny_run, moe_target, tp, shards, ep), world)
    for word in words:
        assert word in str(error.value)


def test_experts_that_do_not_divide(tiny_run, tmp_path):
    path = make_family(tmp_path / "target", "qwen3_moe", num_experts=6, moe_intermediate_size=15)
    with pytest.raises(ConfigError, match=r"experts \(6\).*work here: \[1, 2\]"):
        check(config_of(tiny_run, path, 1, 4, 4), 4)
    with pytest.raises(ConfigError, match=r"width of the target's experts \(15.*expert_parallel"):
        check(config_of(tiny_run, path, 2, 1, 1), 2)
    check(config_of(tiny_run, path, 2, 1, 2), 2)  # whole experts are not cut


def test_a_dense_target_has_no_experts(tiny_run, tmp_path):
    path = make_target(tmp_path / "target")
    with pytest.raises(ConfigError, match="needs a mixture-of-experts target.*qwen3"):
        check(config_of(tiny_run, path, 2, 1, 2), 2)


def test_a_family_without_a_tensor_parallel_plan(tiny_run, tmp_path):
    path = make_family(tmp_path / "target", "gpt_oss")
    with pytest.raises(ConfigError, match="no tensor-parallel plan.*gpt_oss.*shard_across"):
        check(config_of(tiny_run, path, 2, 1, 1, attention="eager", model=DRAFT), 2)
