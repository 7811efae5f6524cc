"""The split target gives the taps of the whole one, and the replicas are the target's own rows."""

import pytest
import torch

from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.logit_transform import TargetHead
from dspark_megatron.ops.vocab_parallel import VocabShard
from dspark_megatron.run.check import check
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_folder import shared_weights, target_fingerprint
from support.target_families import SIZES, save_target
from support.target_states import IDS, elements, tapped
from support.tiny_target import VOCAB_SIZE, make_target, tiny_config


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
    for taps, last_hidden, cached, _, size in ranks:
        torch.testing.assert_close(taps, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last_hidden, own[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-5)
        if tp > 1:
            assert size < 0.8 * sum(p.numel() for p in model.model.parameters())
    rows = torch.cat([rank[3] for rank in ranks[:tp]])
    assert torch.equal(rows[:VOCAB_SIZE], model.get_input_embeddings().weight)
    assert not rows[VOCAB_SIZE:].any()


def taps_alone(runtime, config):
    """States and elements on this rank, of the target as a whole and as far as its taps need."""
    from dspark_megatron.run.build import build_target
    from dspark_megatron.run.check import check

    plan, results = check(config, runtime.world_size), []
    for with_last_hidden in (True, False):
        target = build_target(plan, runtime, with_last_hidden=with_last_hidden)
        states = target.states(Batch(IDS))
        upper = target.layers[max(config.model.target_layer_ids) + 1 :]
        results.append((states, elements(target.model), elements(upper)))
    return results


@pytest.mark.parametrize("world, tp", [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_layers_above_the_last_tap_are_dropped(pool, tiny_run, tmp_path, world, tp, family):
    config = tiny_config(
        tiny_run,
        target={"path": str(make_target(tmp_path / "target", model_type=family))},
        model={"target_layer_ids": [0, 1]},
        parallel={"tensor_parallel": tp},
    )
    for whole, part in pool.run(taps_alone, world=world, tp=tp, config=config):
        assert torch.equal(part[0].taps, whole[0].taps)
        assert whole[0].last_hidden is not None and part[0].last_hidden is None
        assert part[1] == whole[1] - whole[2] and whole[2] > 0 and part[2] == 0


@pytest.mark.parametrize("tp", [1, 2])
def test_a_head_with_a_bias_is_refused(pool, tiny_run, tmp_path, tp):
    import transformers as t

    model = t.PhiForCausalLM(t.PhiConfig(**SIZES))
    torch.nn.init.normal_(model.lm_head.bias)
    path = save_target(tmp_path / "target", model)
    target, parallel = {"path": str(path)}, {"tensor_parallel": tp}
    with pytest.raises(ConfigError, match="does not make its logits as.*its head has a bias"):
        check(tiny_config(tiny_run, target=target, parallel=parallel), tp)
    target["check_logits"] = False  # it is called all the same
    config = tiny_config(tiny_run, target=target, parallel=parallel)
    with pytest.raises(AssertionError, match="own logits are not"):
        pool.run(tapped, world=tp, tp=tp, config=config)


@pytest.mark.parametrize("mistake", ["rows of another rank", "no final norm"])
def test_mistakes_of_our_own_are_found(pool, tiny_run, mistake):
    with pytest.raises(AssertionError, match="own logits are not"):
        pool.run(make_a_mistake, world=1, tp=1, config=tiny_config(tiny_run), mistake=mistake)


def make_a_mistake(runtime, config, mistake):
    from dspark_megatron.run.build import build_target
    from dspark_megatron.run.check import check
    from dspark_megatron.targets.start_checks import check_target_logits

    plan = check(config, runtime.world_size)
    target = build_target(plan, runtime)
    _, name = shared_weights(config.target.path)
    head = SafetensorsFolder(config.target.path).rows(name, 0, VOCAB_SIZE)
    if mistake == "rows of another rank":
        head = head.roll(10, 0)
    else:
        target.model.norm = torch.nn.Identity()
    shard = VocabShard(0, VOCAB_SIZE, VOCAB_SIZE)
    check_target_logits(target, config.target.path, TargetHead(head), shard, IDS)


def test_a_sliding_window_takes_rejected_drafts_back(pool, tiny_run, tmp_path):
    """Beyond the window the cache must still return to where it was."""
    import transformers as t

    model = t.MistralForCausalLM(t.MistralConfig(**SIZES, head_dim=8, sliding_window=5))
    path = save_target(tmp_path / "target", model)
    config = tiny_config(tiny_run, target={"path": str(path)})
    taps, _, cached, _, _ = pool.run(tapped, world=1, tp=1, config=config)[0]
    torch.testing.assert_close(cached, taps, rtol=1e-4, atol=1e-5)


def test_fingerprints_tell_targets_apart(tmp_path):
    one = target_fingerprint(make_target(tmp_path / "one"))
    assert one == target_fingerprint(make_target(tmp_path / "same"))
    assert one != target_fingerprint(make_target(tmp_path / "other", seed=1))
    assert one != target_fingerprint(make_target(tmp_path / "untied", tie=False))


def test_a_folder_without_safetensors(tmp_path):
    with pytest.raises(ConfigError, match="save_pretrained"):
        shared_weights(tmp_path)
