"""Checkpoints and folders of tiny drafts to convert."""

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from dspark_megatron.conversion.layouts import names
from dspark_megatron.shape import DraftShape
from support.shapes import VANILLA

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

PADDED_VOCAB = 36
FINGERPRINT = "0123456789abcdef"


def trained_tensors(shape: DraftShape, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = names.hugging_face_shapes(shape, shared_weights=False)
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def write_target(folder: Path, tied: bool = False, seed: int = 1) -> Path:
    """A target with a config and the two matrices that an export needs of it."""
    generator = torch.Generator().manual_seed(seed)
    size = (VANILLA.vocab_size, VANILLA.hidden_size)
    tensors = {"model.embed_tokens.weight": torch.randn(size, generator=generator)}
    if not tied:
        tensors["lm_head.weight"] = torch.randn(size, generator=generator)
    config = LlamaConfig(
        vocab_size=VANILLA.vocab_size,
        hidden_size=VANILLA.hidden_size,
        intermediate_size=VANILLA.ffn_hidden_size,
        num_hidden_layers=VANILLA.num_target_layers,
        num_attention_heads=VANILLA.num_attention_heads,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=[2, 3],
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_checkpoint(
    run: Path, shape: DraftShape, iteration: int = 100, seed: int = 0, **changes: Tensor
) -> Path:
    """A run folder with one checkpoint as training leaves it, without Megatron."""
    folder = run / "checkpoints" / f"iter_{iteration:07}"
    folder.mkdir(parents=True)
    state = dict(names.to_megatron(shape, trained_tensors(shape, seed).get, PADDED_VOCAB))
    state["optimizer.state.exp_avg.fc.weight"] = torch.zeros(3)
    state |= changes
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    distributed_checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    meta = {
        "format": 1,
        "iteration": iteration,
        "consumed_samples": 8 * iteration,
        "shape": shape.to_dict(),
        "num_anchors": 16,
        "initializer_range": 0.02,
        "confidence_head_alpha": 1.0,
        "target_fingerprint": FINGERPRINT,
    }
    (folder / "dspark.json").write_text(json.dumps(meta))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return run
