"""Targets whose logits are scaled or capped: what is known of a family is what its own class does,
and what is not known is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.logit_transform import LogitTransform, TargetHead
from dspark_megatron.ops.vocab_parallel import gather_vocab
from dspark_megatron.run.check import check
from dspark_megatron.targets import logits
from dspark_megatron.targets.logits import check_logits, logit_transform
from support.target_families import SCALED_LOGITS, SIZES, make_family
from support.target_states import IDS
from support.tiny_target import VOCAB_SIZE, tiny_config

WHOLE = {"falcon_h1", "recurrent_gemma", "inkling_text"}
"""Families that Transformers does not split."""


def config_of(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**SIZES, **SCALED_LOGITS[model_type][0], **changes})


@pytest.mark.parametrize("model_type", SCALED_LOGITS)
def test_the_transform_of_a_family_is_what_its_class_does(model_type):
    config = config_of(model_type)
    assert logit_transform(config) == LogitTransform(*SCALED_LOGITS[model_type][1])
    check_logits(config)


MORE = {
    "beam": dict(final_logit_softcapping=3.0),
    "cohere2_moe": dict(logit_scale=0.25),
    "gemma3n_text": dict(final_logit_softcapping=3.0),
    "gemma4_unified_text": dict(final_logit_softcapping=3.0),
    "granite_swa": dict(logits_scaling=4.0),
    "granitemoe_swa": dict(logits_scaling=4.0),
    "granitemoeshared": dict(logits_scaling=4.0),
    "inkling2_text": dict(final_logit_softcapping=3.0, unpadded_vocab_size=VOCAB_SIZE),
}


@pytest.mark.parametrize("model_type", MORE)
def test_more_families_do_what_is_known_of_them(monkeypatch, model_type):
    config = AutoConfig.for_model(model_type, **SIZES, **MORE[model_type])
    check_logits(config)
    monkeypatch.setattr(logits, "logit_transform", lambda _: LogitTransform())
    with pytest.raises(ConfigError, match="they differ by"):
        check_logits(config)


IMAGES = {
    "muse_glimmer": dict(output_multiplier=0.5, final_logit_softcapping=3.0),
    "granite_docling": dict(logits_scaling=4.0),
    "hyperclovax_vision_v2": dict(logits_scaling=0.5),
}


@pytest.mark.parametrize("model_type", IMAGES)
def test_classes_of_images_and_text_do_so_too(model_type):
    """Their check on the loaded target compares the same."""
    tower = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    config = AutoConfig.for_model(model_type)
    sizes = {**SIZES, **IMAGES[model_type], "head_dim": 8, "num_hidden_layers": 1}
    for part, own in ((config.get_text_config(), sizes), (config.vision_config, tower)):
        for key in own.keys() & part.to_dict().keys():
            setattr(part, key, own[key])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    states = []
    model.model.register_forward_hook(lambda *call: states.append(call[-1][0]))
    with torch.no_grad():
        own = model(input_ids=IDS, use_cache=False).logits
        ours = logit_transform(config).apply_(states[0] @ model.get_output_embeddings().weight.t())
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


def teacher_logits(runtime, config, wrong=None):
    """Logits [2, 15, v] that we make of a target whose start-up check has passed."""
    from dspark_megatron.run.build import build_target, read_target_head
    from dspark_megatron.targets.start_checks import check_target_logits

    plan = check(config, runtime.world_size)
    target = build_target(plan, runtime)
    head, shard = read_target_head(plan, target, tp_group=runtime.tp_group)
    if wrong is not None:
        head = TargetHead(head.weight, wrong)
    check_target_logits(target, config.target.path, head, shard, IDS)
    logits = head.logits(target.states(Batch(IDS)).hidden)
    return gather_vocab(logits, VOCAB_SIZE, tp_group=runtime.tp_group)


HEADS = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8, ffn_hidden_size=48)


def run_of(tiny_run, path, tp=1):
    return tiny_config(
        tiny_run,
        target={"path": str(path), "attention": "eager"},
        model={**HEADS, "rope_parameters": {"rope_theta": 10000.0}},
        parallel={"tensor_parallel": tp},
    )


CASES = [(1, name) for name in SCALED_LOGITS] + [
    (2, name) for name in SCALED_LOGITS if name not in WHOLE
]
"""Tensor-parallel size and family; those of one size together, since new groups take long."""


@pytest.mark.parametrize("tp, model_type", CASES)
def test_teacher_logits_are_the_classes_own(pool, tiny_run, tmp_path, tp, model_type):
    settings, _ = SCALED_LOGITS[model_type]
    path = make_family(tmp_path / "target", model_type, **settings)
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")(IDS).logits
    for ours in pool.run(teacher_logits, world=tp, tp=tp, config=run_of(tiny_run, path, tp)):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["cohere", "gemma2"])
def test_a_wrong_transform_is_refused_at_the_start(pool, tiny_run, tmp_path, model_type):
    path = make_family(tmp_path / "target", model_type, **SCALED_LOGITS[model_type][0])
    for wrong in (LogitTransform(), LogitTransform(0.5), LogitTransform(1.0, 5.0)):
        arguments = dict(config=run_of(tiny_run, path), wrong=wrong)
        with pytest.raises(AssertionError, match="own logits are not"):
            pool.run(teacher_logits, world=1, tp=1, **arguments)


@pytest.mark.parametrize("model_type", ["granite", "cohere2", "gemma2", "gemma4_text"])
@pytest.mark.parametrize("wrong", [(1.0, None), (0.3, None), (1.0, 2.7), (0.9, 3.0)])
def test_a_class_that_does_otherwise_is_found_without_weights(monkeypatch, model_type, wrong):
    monkeypatch.setattr(logits, "logit_transform", lambda _: LogitTransform(*wrong))
    with pytest.raises(ConfigError, match="does not make its logits as .*they differ by"):
        check_logits(config_of(model_type))


def llama(**keys):
    return AutoConfig.for_model("llama", **SIZES, **keys)


UNKNOWN = [
    {"logit_scale": 0.5},
    {"logits_scaling": 8},
    {"final_logit_softcapping": 1.0},
    {"dim_model_base": 256},
    {"output_multiplier": 0.2},
    {"lm_head_multiplier": "half"},
]


@pytest.mark.parametrize("keys", UNKNOWN)
def test_a_key_that_is_not_known_of_the_family_is_refused(keys):
    """Llama's class passes over all of them; an engine may not."""
    with pytest.raises(ConfigError, match="does not know of its family") as error:
        check_logits(llama(**keys))
    assert next(iter(keys)) in str(error.value) and "\n" not in str(error.value)


def test_rows_of_the_head_that_the_class_leaves_out_are_refused():
    with pytest.raises(ConfigError, match="unpadded_vocab_size.: 290"):
        logit_transform(config_of("inkling_text", unpadded_vocab_size=290))
    logit_transform(config_of("inkling_text", unpadded_vocab_size=VOCAB_SIZE))


def test_keys_that_change_nothing_are_passed_over():
    keys = dict(logit_scale=1.0, logits_scaling=1, final_logit_softcapping=None)
    others = dict(output_router_logits=True, attn_logit_softcapping=50.0, num_logits_to_keep=4)
    assert logit_transform(llama(**keys, **others)).is_identity
    assert logit_transform(config_of("gemma2", final_logit_softcapping=None)).is_identity
    assert logit_transform(config_of("granite", logits_scaling=1.0)).is_identity


@pytest.mark.parametrize("value", [0, 0.0, -3.0, True, float("inf"), float("nan")])
def test_a_number_that_is_no_scale_or_cap(value):
    for model_type, key in (("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")):
        config = config_of(model_type)
        config.__dict__[key] = value
        with pytest.raises(ConfigError, match=f"{key} .* must be a number above 0"):
            logit_transform(config)
