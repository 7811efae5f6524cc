"""Targets that read images, too: their text model is found, and gives its states."""

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.target.rank_model import target_bytes
from dspark_megatron.run.check import check
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.huggingface.split import TargetSplit
from support.sharded_targets import own_states
from support.target_families import make_multimodal
from support.target_states import IDS, tapped
from support.tiny_target import VOCAB_SIZE, tiny_config


def whole_states(path, ids):
    """All hidden states of text, by the family's own class."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    return torch.cat([states[1], states[3]], dim=-1), states[-1], model


CASES = [
    ("qwen3_vl", 1, 1),
    ("qwen3_vl_moe", 1, 1),
    ("qwen3_vl_moe", 2, 2),
    ("gemma3", 1, 1),
    ("gemma3", 2, 1),
    ("llava", 1, 1),
    ("llava", 2, 1),
]


@pytest.mark.parametrize("family, tp, ep", CASES)
def test_taps_are_the_text_models(pool, tiny_run, tmp_path, family, tp, ep):
    path = make_multimodal(tmp_path / "target", family)
    parallel = {"tensor_parallel": tp, "expert_parallel": ep}
    config = tiny_config(tiny_run, target={"path": str(path)}, parallel=parallel)
    ranks = pool.run(tapped, world=tp, tp=tp, config=config)
    taps, last_hidden, model = whole_states(path, IDS)
    for rank in ranks:
        torch.testing.assert_close(rank[0], taps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rank[1], last_hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rank[2], taps, rtol=1e-4, atol=1e-5)
    rows = torch.cat([rank[3] for rank in ranks])[:VOCAB_SIZE]
    assert torch.equal(rows, model.get_input_embeddings().weight[:VOCAB_SIZE])


@pytest.mark.parametrize("family, tp", [("qwen3_vl", 1), ("gemma3", 2)])
def test_shards(pool, tiny_run, tmp_path, family, tp):
    path = make_multimodal(tmp_path / "target", family)
    target = {"path": str(path), "shard_across_data_parallel": 2}
    config = tiny_config(tiny_run, target=target, parallel={"tensor_parallel": tp})
    ranks = pool.run(own_states, world=2 * tp, tp=tp, config=config, with_last_hidden=True)
    planned = target_bytes(load_target_config(path), torch.float32, TargetSplit(tp, 2, 2)) / 4
    for ids, taps, last_hidden, before, after in ranks:
        expected = whole_states(path, ids)
        torch.testing.assert_close(taps, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last_hidden, expected[1], rtol=1e-4, atol=1e-5)
        # The vision tower stays whole, and the half that this rank had of it is not given back.
        assert after + (after - before) == pytest.approx(planned, rel=0.02)


def test_a_family_without_a_tensor_parallel_plan(tiny_run, tmp_path):
    path = make_multimodal(tmp_path / "target", "qwen3_vl")
    config = tiny_config(tiny_run, target={"path": str(path)}, parallel={"tensor_parallel": 2})
    with pytest.raises(ConfigError, match="no tensor-parallel plan.*qwen3_vl"):
        check(config, 2)


def test_experts_that_transformers_cannot_cut(pool, tiny_run, tmp_path):
    """Its loader turns Qwen3-VL-MoE's matrices after it has cut them, along the wrong side."""
    path = make_multimodal(tmp_path / "target", "qwen3_vl_moe")
    config = tiny_config(tiny_run, target={"path": str(path)}, parallel={"tensor_parallel": 2})
    with pytest.raises(AssertionError, match="ConfigError.*in another shape.*experts"):
        pool.run(tapped, world=2, tp=2, config=config)


def test_a_folder_that_lacks_weights(pool, tiny_run, tmp_path):
    from safetensors.torch import load_file, save_file

    path = make_multimodal(tmp_path / "target", "llava")
    tensors = load_file(path / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config(tiny_run, target={"path": str(path)})
    with pytest.raises(AssertionError, match="lacks 1 of the weights.*layers.1.mlp.up_proj"):
        pool.run(tapped, world=1, tp=1, config=config)
