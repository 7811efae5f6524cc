"""Checkpoints and folders of tiny drafts to convert."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.import_draft import BACKEND, import_folder
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
    (folder / "metadata.json").write_text(json.dumps(BACKEND))
    torch.save({"optimizer": {"param_groups": [{}]}}, folder / "common.pt")
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return run


def export(run: Path, target: Path, out: Path, **options: Any) -> Path:
    return export_checkpoint(run, target, out, WriteOptions(**options))


def export_fp32(
    run: Path,
    target: Path,
    out: Path,
    layout: str = "hf",
    dtype: Any = torch.float32,
    **options: Any,
) -> Path:
    return export(run, target, out, layout=layout, dtype=dtype, **options)


def import_(folder: Path, target: Path, run: Path, **options: Any) -> Path:
    return import_folder(folder, target, run, fingerprint=lambda path: FINGERPRINT, **options)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder in place, or to the dictionary that `change` returns."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, change: Callable[[dict], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
