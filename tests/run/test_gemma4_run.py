"""A run of a Gemma-4 draft for a Gemma-4 target: what it takes over, training, going on at another
layout, decoding, and layers to start from."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma4Config

from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.verify import verify_folder
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.run.check import check
from dspark_megatron.run.initial.warm_start import WarmStart
from dspark_megatron.run.known_draft import with_draft_of
from dspark_megatron.shape import draft_shape
from dspark_megatron.shape.layout import check_draft_split
from support.decoded import PROMPTS, decode
from support.gemma4_reference import Gemma4ClassesDraft
from support.shapes import GEMMA4
from support.target_families import SIZES, make_family
from support.tiny_target import tiny_config
from support.training_runs import assert_same_curve, curve, latest, run_training

OWN = dict(
    head_dim=4,
    global_head_dim=8,
    num_global_key_value_heads=2,
    attention_k_eq_v=True,
    hidden_size_per_layer_input=0,
    sliding_window=64,
    layer_types=["sliding_attention", "full_attention"] * 2,
    final_logit_softcapping=3.0,
)
"""Of the target."""
ROPE = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("gemma4"), "gemma4_text", **OWN)


def config_of(tiny_run, target, output="unused", model=None, **sections):
    train = {"output_dir": str(output), "iterations": 20, "save_every": 10, "keep_last": 9}
    model = {"architecture": "gemma4", **(model or {})}
    sections.setdefault("train", train)
    return tiny_config(tiny_run, target={"path": str(target)}, model=model, **sections)


def text_config(**changes):
    return AutoConfig.for_model("gemma4_text", **{**SIZES, **OWN, **changes})


def shape_for(tiny_run, text, **model):
    return draft_shape(config_of(tiny_run, "unused", model=model).model, text)


def test_a_draft_takes_over_the_full_attention_layers(tiny_run):
    shape = shape_for(tiny_run, text_config())
    heads = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    assert heads == (8, 2, 8) and shape.shared_key_value and shape.logit_softcapping == 3.0
    assert shape.rope_parameters == ROPE
    apart = shape_for(tiny_run, text_config(attention_k_eq_v=False))
    assert apart.num_key_value_heads == 4 and not apart.shared_key_value
    whole = Gemma4Config(text_config=text_config().to_dict())
    assert shape_for(tiny_run, whole) == shape
    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert shape_for(tiny_run, whole, rope_parameters=plain).rope_parameters == plain
    given = {**ROPE, "rope_theta": "5e5", "partial_rotary_factor": 0.5}
    own = shape_for(tiny_run, whole, rope_parameters=given, num_key_value_heads=1)
    assert own.rope_parameters == {**given, "rope_theta": 5e5} and own.num_key_value_heads == 1


REFUSED = [
    ({"enable_moe_block": True, "num_experts": 4}, {}, r"experts \(enable_moe_block\)"),
    ({"hidden_size_per_layer_input": 8}, {}, "embeddings for each layer"),
    ({"hidden_activation": "silu"}, {}, "the activation 'silu'"),
    ({}, {"attention": {"window": 8}}, "knows windows, causal blocks, sinks or a logit scale"),
    ({}, {"attention": {"sink": True}}, "knows windows"),
    ({}, {"logit_scale": 0.5}, "knows windows"),
    ({}, {"rope_parameters": {**ROPE, "partial_rotary_factor": 2}}, r"in \(0, 1\]"),
    ({}, {"rope_parameters": {**ROPE, "beta_fast": 2}}, r"has \['beta_fast'\]"),
    ({}, {"num_key_value_heads": 3}, r"divisible by key/value heads \(3\)"),
    ({}, {"backend": "transformer_engine"}, "no layers of model.architecture=gemma4"),
]


@pytest.mark.parametrize("text, model, message", REFUSED)
def test_what_such_a_draft_cannot_be_is_refused_with_the_way_out(tiny_run, text, model, message):
    from dspark_megatron.model.layer_specs import chosen_layer_spec

    with pytest.raises(ConfigError, match=message):
        shape_for(tiny_run, text_config(**text), **model)
        chosen_layer_spec(config_of(tiny_run, "unused", model=model).model)


def test_another_target_has_no_gemma4_draft(tiny_run):
    config = tiny_config(tiny_run, model={"architecture": "gemma4"})
    with pytest.raises(ConfigError, match="for Gemma-4 targets, and this is a 'qwen3'"):
        check(config, 1)


def test_ranks_may_share_key_value_heads():
    for tp in (1, 2, 4, 8):
        check_draft_split(GEMMA4, tp)
    with pytest.raises(ConfigError, match=r"heads \(3\) must .* \(2\), or key/value .* \[1\]"):
        check_draft_split(replace(GEMMA4, num_attention_heads=6, num_key_value_heads=3), 2)


@pytest.fixture(scope="module")
def run(pool, tiny_run, target, tmp_path_factory):
    """Of a draft with one key/value head."""
    output = tmp_path_factory.mktemp("gemma4_run") / "run"
    config = config_of(tiny_run, target, output, model={"num_key_value_heads": 1})
    pool.run(run_training, world=1, tp=1, config=config)
    return output


def test_it_learns_and_goes_on_at_another_layout(pool, tiny_run, target, run, tmp_path):
    """Where two ranks share the head."""
    rows = curve(run)
    assert rows[-1]["loss"] < rows[0]["loss"]
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / "iter_0000020")
    (again / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
    parallel = {"tensor_parallel": 2, "sequence_parallel": True}
    model = {"num_key_value_heads": 1}
    config = config_of(tiny_run, target, again, model=model, parallel=parallel)
    pool.run(run_training, world=2, tp=2, config=config)
    assert latest(again) == 20
    assert_same_curve(curve(again)[10:], rows[10:], rel=1e-3)


def test_its_export_is_a_plain_gemma4_draft(tiny_run, target, run, tmp_path):
    out = export_checkpoint(run, target, tmp_path / "export")
    verify_folder(out, checkpoint=run, target_dir=target)
    config = config_of(tiny_run, target)
    shape = check(with_draft_of(config, run / "checkpoints" / "iter_0000020"), 1).shape
    assert shape.num_key_value_heads == 1
    draft = Gemma4ClassesDraft(shape)
    draft.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    assert json.loads((out / "config.json").read_text())["final_logit_softcapping"] == 3.0


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_output_is_the_targets_own(pool, tiny_run, target, tp):
    model = {"num_key_value_heads": 1}
    config = config_of(tiny_run, target, model=model, parallel={"tensor_parallel": tp})
    ranks = pool.run(decode, world=tp, tp=tp, config=config, prompts=PROMPTS)
    own_model = AutoModelForCausalLM.from_pretrained(target)
    for ids, fast, slow, _ in ranks[0]:
        own = own_model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        assert fast == slow == own[0, len(ids) :].tolist()


def test_a_dry_run_plans_it(tiny_run, target):
    config = config_of(tiny_run, target, parallel={"tensor_parallel": 2})
    assert "architecture: gemma4" in describe_run(config, world_size=2)


def first_weights(runtime, config):
    from dspark_megatron.run.build import build_draft

    plan = check(config, runtime.world_size)
    draft, warm_start = build_draft(plan, runtime), WarmStart.open(plan)
    warm_start.load(draft, tp_group=runtime.tp_group)
    return dict(draft.named_parameters()), warm_start.describe()


def test_full_layers_fit_whole_and_sliding_ones_without_attention(pool, tiny_run, target):
    model = {"initialize_from_target_layers": [3, 2]}
    config = config_of(tiny_run, target, model=model)
    [(draft, report)] = pool.run(first_weights, world=1, tp=1, config=config)
    tensors = load_file(target / "model.safetensors")

    def theirs(name):
        return next(x for key, x in tensors.items() if key.endswith(name))

    same = {
        "layers.0.self_attention.linear_kv.weight": "layers.3.self_attn.k_proj.weight",
        "layers.0.post_mlp_layernorm.weight": "layers.3.post_feedforward_layernorm.weight",
        "layers.1.mlp.linear_fc2.weight": "layers.2.mlp.down_proj.weight",
        "layers.1.layer_scalar.value": "layers.2.layer_scalar",
    }
    for ours, name in same.items():
        assert torch.equal(draft[ours], theirs(name)), ours
    assert "other heads than the draft's: self_attn.o_proj" in report or "[32, 32] there" in report
