"""States of the provider `megatron` beside those of Transformers."""

import torch
from safetensors.torch import load_file, save_file

from dspark_megatron.data.batch import Batch
from dspark_megatron.run.check import check
from support.target_families import make_family
from support.target_states import IDS, cached_taps
from support.tiny_target import tiny_config

DRAFT = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8, ffn_hidden_size=48)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

TARGETS = {
    "llama": (
        "llama",
        dict(rope_parameters=LLAMA3, max_position_embeddings=16384),
    ),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True, num_key_value_heads=2)),
    "experts": ("qwen3_moe", dict(norm_topk_prob=True)),
    "mixed": ("qwen3_moe", dict(mlp_only_layers=[1], num_key_value_heads=2)),
}


def make_target(name, folder):
    """Save a target of TARGETS with Hugging Face weights; returns its folder."""
    family, settings = TARGETS[name]
    make_family(folder, family, **settings)
    with_noise(folder)
    return folder


def with_noise(folder):
    """Biases and norms away from the values that any mistake gives."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})


def config_of(tiny_run, path, tp=1, ep=1, *, target=None, parallel=None, **sections):
    return tiny_config(
        tiny_run,
        target={"path": str(path), "provider": "megatron", **(target or {})},
        parallel={"tensor_parallel": tp, "expert_parallel": ep, **(parallel or {})},
        **{"model": DRAFT, **sections},
    )


def megatron_states(runtime, config):
    """States and cached taps of a target whose logits were checked."""
    from dspark_megatron.run.build import build_draft, build_target, load_target_head
    from dspark_megatron.targets.start_checks import check_target_logits

    plan = check(config, runtime.world_size)
    target, draft = build_target(plan, runtime), build_draft(plan, runtime)
    head = load_target_head(plan, draft, target)
    check_target_logits(target, config.target.path, head, draft.vocab_shard, IDS)
    states = target.states(Batch(IDS))
    return states.taps, states.last_hidden, cached_taps(target)


def whole(path, ids=IDS):
    """Taps and last hidden states by Transformers."""
    from transformers import AutoModel

    with torch.no_grad():
        own = AutoModel.from_pretrained(path)(ids, output_hidden_states=True).hidden_states
    return torch.cat([own[1], own[3]], -1), own[-1]


def assert_states(ranks, path):
    taps, last_hidden = whole(path)
    for rank in ranks:
        torch.testing.assert_close(rank[0], taps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rank[1], last_hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rank[2], taps, rtol=1e-4, atol=1e-5)
