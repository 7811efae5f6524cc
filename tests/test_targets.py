"""The split target gives the taps of the whole one, and the replicas are the target's own rows."""

import pytest
import torch
from tiny_target import VOCAB_SIZE, make_target, tiny_config

from dspark_megatron.config import ConfigError
from dspark_megatron.target_folder import read_rows, shared_weights, target_fingerprint

IDS = torch.arange(30).view(2, 15) + 40


def tapped(runtime, config):
    """Taps, last hidden states and the teacher check of a target at this layout."""
    from dspark_megatron.targets.teacher_check import check_teacher_logits
    from dspark_megatron.training.setup import build_draft, build_target, check_run

    plan = check_run(config, runtime.world_size)
    target, draft = build_target(plan, runtime), build_draft(plan, runtime)
    states = target.states(IDS)
    check_teacher_logits(
        target, draft.lm_head.weight, IDS, plan.shape.vocab_size, tp_group=runtime.tp_group
    )
    cache = target.new_cache()
    first = target.extend(IDS[:1, :6], cache)
    target.extend(IDS[1:, :3], cache)
    target.forget(cache, 3)
    second = target.extend(IDS[:1, 6:], cache)
    cached = torch.cat([first.taps, second.taps], dim=1)
    elements = sum(
        (p.to_local() if hasattr(p, "to_local") else p).numel() for p in target.model.parameters()
    )
    return states.taps, states.last_hidden, cached, draft.embed_tokens.weight, elements


@pytest.mark.parametrize("world, tp", [(1, 1), (2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("family, tie", [("qwen3", False), ("llama", True)])
def test_taps_are_the_whole_targets(pool, tiny_run, tmp_path, world, tp, family, tie):
    from transformers import AutoModelForCausalLM

    path = make_target(tmp_path / "target", tie=tie, model_type=family)
    config = tiny_config(tiny_run, target={"path": str(path)}, parallel={"tensor_parallel": tp})
    ranks = pool.run(tapped, world=world, tp=tp, config=config)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        own = model(IDS, output_hidden_states=True).hidden_states
    expected = torch.cat([own[i + 1] for i in config.model.target_layer_ids], dim=-1)
    for taps, last_hidden, cached, _, elements in ranks:
        torch.testing.assert_close(taps, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last_hidden, own[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cached, expected[:1], rtol=1e-4, atol=1e-5)
        if tp > 1:
            assert elements < 0.8 * sum(p.numel() for p in model.model.parameters())
    rows = torch.cat([rank[3] for rank in ranks[:tp]])
    assert torch.equal(rows[:VOCAB_SIZE], model.get_input_embeddings().weight)
    assert not rows[VOCAB_SIZE:].any()


def test_a_target_whose_logits_are_scaled_is_refused(pool, tiny_run, tmp_path):
    """Cohere multiplies its logits: training on lm_head(last_hidden) would be wrong."""
    from transformers import CohereConfig, CohereForCausalLM

    plain = make_target(tmp_path / "tokenizer")
    config = CohereConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        logit_scale=0.25,
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=256,
    )
    path = tmp_path / "cohere"
    CohereForCausalLM(config).save_pretrained(path)
    for file in plain.glob("*token*"):
        (path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(AssertionError, match="logit scale"):
        pool.run(tapped, world=1, tp=1, config=tiny_config(tiny_run, target={"path": str(path)}))


def test_a_wrong_head_is_found(pool, tiny_run):
    with pytest.raises(AssertionError, match="differ by"):
        pool.run(check_wrong_head, world=1, tp=1, config=tiny_config(tiny_run))


def check_wrong_head(runtime, config):
    from dspark_megatron.targets.teacher_check import check_teacher_logits
    from dspark_megatron.training.setup import build_target, check_run

    plan = check_run(config, runtime.world_size)
    target = build_target(plan, runtime)
    norm = target.model.norm
    target.model.norm = torch.nn.Sequential(norm, norm)  # a final norm applied twice
    states = target.states(IDS)
    target.model.norm = norm
    target.states = lambda _: states
    _, name = shared_weights(config.target.path)
    head = read_rows(config.target.path, name, 0, VOCAB_SIZE)
    check_teacher_logits(target, head, IDS, VOCAB_SIZE, tp_group=runtime.tp_group)


def test_fingerprints_tell_targets_apart(tmp_path):
    one = target_fingerprint(make_target(tmp_path / "one"))
    assert one == target_fingerprint(make_target(tmp_path / "same"))
    assert one != target_fingerprint(make_target(tmp_path / "other", seed=1))
    assert one != target_fingerprint(make_target(tmp_path / "untied", tie=False))


def test_a_folder_without_safetensors(tmp_path):
    with pytest.raises(ConfigError, match="save_pretrained"):
        shared_weights(tmp_path)
