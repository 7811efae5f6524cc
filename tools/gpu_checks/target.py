"""A target of Transformers on this device: taps by hooks, passes of bounded size, packing."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.build import build_target
from dspark_megatron.run.check import check as check_run
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget
from dspark_megatron.targets.start_checks import check_packing
from gpu_checks.context import Context, check_close
from support.tiny_target import make_chats, make_target, tiny_config, tiny_settings

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Passes and rows of another size take other kernels, whose sums are in another order."""
SHAPE = dict(hidden_size=256, heads=8, kv_heads=4, head_dim=32)


def check(context: Context) -> None:
    runtime = context.runtime()
    folder = make_target(context.folder / "target", **({} if context.tiny else SHAPE))
    chats = make_chats(context.folder / "chats.jsonl")
    settings = tiny_settings(folder, chats, context.folder / "run")
    ids = (torch.arange(120).view(3, 40) * 7) % 290
    for dtype, tolerance in TOLERANCE.items():
        build = _Builder(runtime, settings, dtype)
        expected = _own_states(folder, ids, build.layer_ids, getattr(torch, dtype), context.device)
        for passes in (None, 16):
            states = build.target(max_tokens_per_forward=passes).states(Batch(ids))
            found = states.taps, states.last_hidden
            label = f"{dtype}, passes of {passes or 'any number of'} tokens"
            for name, got, want in zip(("taps", "last hidden"), found, expected, strict=True):
                check_close(context, f"{name} ({label})", got, want, tolerance)
        _check_packing(context, build, ids, dtype)


class _Builder:
    def __init__(self, runtime: Runtime, settings: dict, dtype: str) -> None:
        self.runtime, self.settings, self.dtype = runtime, settings, dtype
        self.layer_ids = settings["model"]["target_layer_ids"]

    def target(self, **options: object) -> HuggingFaceTarget:
        train = {"micro_batch_size": 2}
        config = tiny_config(self.settings, train=train, target={"dtype": self.dtype, **options})
        return build_target(check_run(config, 1), self.runtime)


def _own_states(
    folder: Path, ids: Tensor, layer_ids: list[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False
    ).to(device)
    with torch.no_grad():
        own = model(ids.to(device), output_hidden_states=True).hidden_states
    return torch.cat([own[i + 1] for i in layer_ids], dim=-1), own[-1]


def _check_packing(context: Context, build: _Builder, ids: Tensor, dtype: str) -> None:
    """The check that a packed run makes at its start, by kind of attention."""
    samples = [row[: 40 - 9 * i] for i, row in enumerate(ids)]
    kinds = ["sdpa"]
    if dtype == "bfloat16" and context.device.type == "cuda":
        kinds += ["flash_attention_2"] if importlib.util.find_spec("flash_attn") else []
    for attention in kinds:
        try:
            check_packing(build.target(packing=True, attention=attention), samples)
        except ConfigError as error:
            raise AssertionError(str(error)) from error
    context.figures[f"packing holds with ({dtype})"] = kinds
