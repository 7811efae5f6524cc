"""Provider `megatron` gives the states of provider `huggingface` on the same weights."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.planning.target.plan import target_pass, target_weights
from dspark_megatron.planning.target.target_pass import OUTPUTS
from dspark_megatron.run.check import check
from dspark_megatron.targets.megatron.gpt_shape import gpt_shape_of
from dspark_megatron.targets.megatron.target import MegatronTarget
from support.megatron_targets import (
    DRAFT,
    LLAMA3,
    TARGETS,
    assert_states,
    config_of,
    megatron_states,
    whole,
)
from support.target_families import make_family
from support.target_states import IDS
from support.tiny_target import tiny_config
from support.training_runs import assert_same_curve, curve, run_training


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", TARGETS)
def test_states_are_those_of_transformers(pool, tiny_run, target, name, tp):
    """Also with more ranks than key/value heads."""
    path = target(name)
    ranks = pool.run(megatron_states, world=tp, tp=tp, config=config_of(tiny_run, path, tp))
    assert_states(ranks, path)


def test_a_model_that_scales_its_logits_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(use_mup=True))
    with pytest.raises(ConfigError, match="use_mup scales its logits"):
        MegatronTarget(model, (0,))


SPREAD = [("experts", *layout) for layout in [(2, 1, 2), (2, 2, 2), (4, 2, 2), (4, 4, 2)]]


@pytest.mark.parametrize("name, world, tp, ep", [*SPREAD, ("mixed", 4, 2, 4)])
def test_experts_spread_over_ranks(pool, tiny_run, target, name, world, tp, ep):
    path = target(name)
    ranks = pool.run(megatron_states, world=world, tp=tp, config=config_of(tiny_run, path, tp, ep))
    assert_states(ranks, path)


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallel_states_are_whole(pool, tiny_run, target, tp):
    """15 tokens are no multiple of the ranks."""
    path = target("qwen3")
    config = config_of(tiny_run, path, tp, parallel={"sequence_parallel": True})
    assert_states(pool.run(megatron_states, world=tp, tp=tp, config=config), path)


@pytest.fixture(scope="module")
def curves(pool, tiny_run, target, tmp_path_factory):
    """The curve of provider huggingface on one rank, by target."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"{name}_curve")
            train = {"output_dir": str(made[name]), "iterations": 6}
            settings = {"path": str(target(name))}
            config = tiny_config(tiny_run, target=settings, model=DRAFT, train=train)
            pool.run(run_training, world=1, tp=1, config=config)
        return curve(made[name])

    return make


@pytest.mark.parametrize(
    "name, world, tp, ep, settings",
    [
        ("qwen3", 2, 2, 1, {}),
        ("qwen3", 4, 2, 1, {"max_tokens_per_forward": 48}),
        ("experts", 2, 1, 2, {}),
        ("experts", 4, 2, 4, {"max_tokens_per_forward": 48}),
    ],
)
def test_the_curve_is_the_same(
    pool, tiny_run, target, curves, tmp_path, name, world, tp, ep, settings
):
    train = {"output_dir": str(tmp_path), "iterations": 6, "micro_batch_size": 2}
    config = config_of(tiny_run, target(name), tp, ep, target=settings, train=train)
    pool.run(run_training, world=world, tp=tp, config=config)
    assert_same_curve(curve(tmp_path), curves(name))


def test_a_sample_that_no_pass_holds(pool, tiny_run, target):
    most = {"target": {"max_tokens_per_forward": 14}, "data": {"max_length": 14}}
    config = config_of(tiny_run, target("qwen3"), **most)
    with pytest.raises(AssertionError, match=r"must hold a whole sample.*15 tokens"):
        pool.run(megatron_states, world=1, tp=1, config=config)


def built_by_hand(runtime, path, modelopt=False):
    """The examples of docs/megatron.md."""
    from transformers import AutoConfig

    from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
    from dspark_megatron.targets.megatron.gpt_model import build_gpt_model
    from dspark_megatron.targets.megatron.groups import target_groups
    from dspark_megatron.targets.megatron.hf_weights import load_hf_weights
    from dspark_megatron.targets.megatron.target import MegatronTarget

    groups = target_groups(tp_group=runtime.tp_group)
    shape = gpt_shape_of(AutoConfig.from_pretrained(path))
    model = build_gpt_model(shape, groups, params_dtype=torch.float32, device=runtime.device)
    if modelopt:
        from modelopt.torch.export import import_mcore_gpt_from_hf

        import_mcore_gpt_from_hf(model, path, dtype=torch.float32)
    else:
        load_hf_weights(model, shape, SafetensorsFolder(path))
    states = MegatronTarget(model, (0, 2)).states(Batch(IDS))
    part = MegatronTarget(model, (0, 1), with_last_hidden=False)
    return states.taps, states.last_hidden, part.states(Batch(IDS)), len(part.layers)


def test_a_model_that_the_user_built(pool, target):
    path = target("qwen2")
    taps, last_hidden, part, layers = pool.run(built_by_hand, world=2, tp=2, path=str(path))[0]
    expected, own = whole(path)
    torch.testing.assert_close(taps, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_hidden, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.taps[..., :32], expected[..., :32], rtol=1e-4, atol=1e-5)
    assert part.last_hidden is None and layers == 2


def test_weights_by_modelopt(pool, tmp_path):
    """An extra, which the tests run only where it is installed."""
    pytest.importorskip("modelopt")
    path = make_family(tmp_path / "target", "qwen3", vocab_size=302)
    taps, *_ = pool.run(built_by_hand, world=2, tp=2, path=str(path), modelopt=True)[0]
    torch.testing.assert_close(taps, whole(path)[0], rtol=1e-4, atol=1e-5)


def held_bytes(runtime, config):
    from dspark_megatron.run.build import build_target
    from dspark_megatron.run.check import check

    target = build_target(check(config, runtime.world_size), runtime)
    target.own_logits(IDS)
    return sum(parameter.nbytes for parameter in target.model.parameters())


@pytest.mark.parametrize("name, tp, ep", [("qwen3", 2, 1), ("mixed", 2, 1), ("experts", 2, 2)])
def test_the_dry_run_knows_the_weights(pool, tiny_run, target, name, tp, ep):
    config = config_of(tiny_run, target(name), tp, ep)
    plan = check(config, tp, use="plan")
    assert max(pool.run(held_bytes, world=tp, tp=tp, config=config)) == target_weights(plan)
    assert OUTPUTS in {one.group for one in target_pass(plan).work.sent}
    text = describe_run(config, tp)
    assert "by formula: " not in text and "frozen target" in text


BAD_FAMILIES = {
    "another family": ("olmoe", {}, "knows the families llama, qwen2, qwen3, qwen3_moe"),
    "another RoPE": (
        "llama",
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        "'linear'",
    ),
    "other constants": (
        "llama",
        dict(rope_parameters={**LLAMA3, "low_freq_factor": 2.0}, max_position_embeddings=16384),
        "low_freq_factor (2.0) must be 1.0",
    ),
    "biases": ("llama", dict(attention_bias=True), "attention_bias (True) must be False"),
    "another activation": ("qwen3", dict(hidden_act="gelu"), "hidden_act (gelu) must be silu"),
    "quantized": ("qwen3", dict(quantization_config={"quant_method": "fp8"}), "must be None"),
    "a window": ("qwen2", dict(use_sliding_window=True), "use_sliding_window (True)"),
}


@pytest.mark.parametrize("case", BAD_FAMILIES)
def test_models_that_are_not_supported(tiny_run, tmp_path, case):
    family, settings, words = BAD_FAMILIES[case]
    path = make_family(tmp_path / "target", family, **settings)
    with pytest.raises(ConfigError) as error:
        check(config_of(tiny_run, path), 1)
    assert words in str(error.value)


def test_layouts_that_cannot_work(tiny_run, target):
    for name, world, tp, ep, words in (
        ("qwen3", 2, 1, 2, "this one is dense"),
        ("experts", 3, 1, 3, "sizes that work here: [1]"),
        ("experts", 8, 2, 8, None),
    ):
        config = config_of(tiny_run, target(name), tp, ep)
        if words is None:
            check(config, world)
            continue
        with pytest.raises(ConfigError) as error:
            check(config, world)
        assert words in str(error.value)


def test_settings_of_the_other_provider(tiny_run, target):
    for settings, words in (
        ({"attention": "eager"}, "target.attention"),
        ({"shard_across_data_parallel": 2}, "shard_across_data_parallel"),
        ({"provider": "huggingface", "checkpoint": "there"}, "read by target.provider=megatron"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_of(tiny_run, target("qwen3"), target=settings)


@pytest.mark.parametrize("change", ["lacks", "unknown", "instead of"])
def test_folders_that_hold_other_tensors(pool, tiny_run, target, tmp_path, change):
    path = shutil.copytree(target("qwen3"), tmp_path / "target")
    tensors = load_file(path / "model.safetensors")
    if change == "lacks":
        del tensors["model.norm.weight"]
    elif change == "unknown":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    else:
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(24, 32)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match=change):
        pool.run(megatron_states, world=1, tp=1, config=config_of(tiny_run, path))
