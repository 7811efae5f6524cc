"""Targets with recurrent layers: decoding takes their states back, or is refused before loading."""

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.targets.family import RECURRENT, check_decoding, check_pieces, model_class
from dspark_megatron.targets.huggingface import kv_cache as cached_sequences
from support.decoded import PROMPTS, decode
from support.target_families import SIZES, save_target
from support.target_states import IDS
from support.tiny_target import tiny_config

DELTA = dict(
    head_dim=8,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8)
FAMILIES = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": DELTA,
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "nemotron_h": dict(
        hybrid_override_pattern="M*-M",
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        head_dim=8,
    ),
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
        "logits_scaling": 1.0,
    },
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2, block_ff_dim=48),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, **EXPERTS, num_dense_layers=1),
}
"""What each has beside SIZES."""


def recurrent_config(family, **overrides):
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **overrides})


def test_every_family_that_is_decoded_with_is_tried():
    assert set(FAMILIES) == set(RECURRENT)


@pytest.mark.parametrize("family", RECURRENT)
def test_states_of_a_text_in_pieces_are_those_of_the_whole(family):
    """With drafts that are taken back on the way."""
    from transformers import AutoModel

    config = recurrent_config(family)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    ids, cache = IDS[:1], cached_sequences.SequenceCache(config)

    @torch.no_grad()
    def run(tokens):
        cache.remember(tokens)
        arguments = cache.arguments(tokens.shape[1], ids.device)
        states = model(input_ids=tokens, **arguments).last_hidden_state
        cache.extended(tokens.shape[1])
        return states

    cache.lengths, found = [0], []
    for start, end, drafted in ((0, 7, 0), (7, 8, 3), (8, 11, 2), (11, 12, 0), (12, 15, 1)):
        own = ids[:, start:end]
        found.append(run(torch.cat([own, torch.full((1, drafted), 7)], dim=1))[:, : end - start])
        again = cache.forget([drafted])
        if again is not None:
            run(again)
            assert cache.forget([0]) is None
        assert cache.lengths == [end]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family, tp", [("qwen3_5_text", 1), ("lfm2", 1), ("nemotron_h", 1)])
def test_greedy_decoding_is_lossless(pool, tiny_run, tmp_path, family, tp):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(recurrent_config(family), dtype=torch.float32)
    path = save_target(tmp_path / "target", model)
    rope = {"rope_theta": 1e4}
    config = tiny_config(
        tiny_run,
        target={"path": str(path)},
        model={"rope_parameters": rope, "ffn_hidden_size": 48},
        evaluate={"batch_size": 1},
    )
    ranks = pool.run(decode, world=1, tp=tp, config=config, prompts=PROMPTS)
    for ids, fast, slow, _ in ranks[0]:
        own = model.eval().generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        assert fast == slow == own[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "family, sizes",
    [
        ("mamba", {}),
        ("mamba2", dict(num_heads=8, head_dim=8, n_groups=2)),
        ("jamba", {}),
        ("recurrent_gemma", {}),
        ("rwkv", {}),
    ],
)
def test_families_that_forget_are_refused_by_their_config(family, sizes):
    config = recurrent_config(family, **sizes)
    assert model_class(config)._is_stateful
    with pytest.raises(ConfigError, match="recurrent states.*not decoded with"):
        check_decoding(config, 1)
    with pytest.raises(ConfigError, match="in pieces.*the way out"):
        check_pieces(config, "the way out")


def test_several_sequences_are_refused_before_loading():
    with pytest.raises(ConfigError, match="LinearAttentionLayer.*set evaluate.batch_size=1"):
        check_decoding(recurrent_config("qwen3_5_text"), 8)
    check_decoding(recurrent_config("qwen3_5_text"), 1)
