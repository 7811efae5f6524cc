"""A tiny Qwen3-like target with its tokenizer and chats, as a folder and a config."""

import json
import random
from pathlib import Path

import torch

from dspark_megatron.config import Config
from dspark_megatron.config.loading import config_from_dict
from support.tiny_tokenizer import tiny_tokenizer

VOCAB_SIZE = 301  # no multiple of 2 or 4
WORDS = "the hill in the inn well hello then all bell thin there".split()


def make_target(
    folder: Path,
    *,
    tie: bool = True,
    seed: int = 0,
    model_type: str = "qwen3",
    hidden_size: int = 32,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 8,
    num_layers: int = 4,
    intermediate_size: int = 48,
    vocab_size: int = VOCAB_SIZE,
):
    """Save a random target; returns its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny_tokenizer(vocab_size)
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[model_type]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_chats(path: Path, count: int = 24) -> Path:
    rng = random.Random(0)

    def words(low, high):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = [
                {"role": "user", "content": words(1, 4)},
                {"role": "assistant", "content": words(4, 9)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def tiny_settings(target: Path, data: Path, output: Path) -> dict:
    """Sections of a run that takes seconds."""
    return {
        "target": {"path": str(target)},
        "model": {
            "num_layers": 2,
            "block_size": 3,
            "num_anchors": 6,
            "target_layer_ids": [0, 2],
            "mask_token_id": tiny_tokenizer(VOCAB_SIZE).mask_token_id,
            "markov_rank": 8,
        },
        "loss": {"chunk_rows": 32},
        "data": {"train_files": [str(data)], "max_length": 48, "show_sample": False},
        "optimizer": {"lr": 1e-2, "warmup_ratio": 0.2},
        "train": {
            "output_dir": str(output),
            "iterations": 20,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "dtype": "float32",
            "log_every": 1,
            "save_every": 5,
        },
        "evaluate": {"temperature": 0.0, "max_new_tokens": 24},
    }


def tiny_config(settings: dict, **sections: dict) -> Config:
    """A checked Config; `sections` override single keys."""
    merged = {name: dict(values) for name, values in settings.items()}
    for name, values in sections.items():
        merged.setdefault(name, {}).update(values)
    config = config_from_dict(merged)
    config.validate()
    return config
