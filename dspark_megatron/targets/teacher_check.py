"""Start-up check: the logits that the loss makes are the target's own."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from dspark_megatron.config import ConfigError
from dspark_megatron.ops.vocab_parallel import VocabShard
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.family import without_layers
from dspark_megatron.targets.huggingface import HuggingFaceTarget, layer_output

_POSITIONS = 16


@torch.no_grad()
def check_teacher_logits(
    target: Any,
    folder: str | Path,
    lm_head: Tensor,
    shard: VocabShard,
    input_ids: Tensor,
) -> None:
    """Compare `lm_head(last_hidden)` with the target's own logits: a GPTModel's are those of its
    output layer (`own_logits`), any other's those of the family's own language-model class.

    Transformers loads that class from the same folder with no decoder layer, and it turns the split
    target's last layer output into logits: so wrong rows of the head, a head with a bias, a logit
    scale or soft cap, and a final norm that is missing or doubled all show. Costs the embedding and
    the head, whole, in host memory while it runs. lm_head [v/tp, h], input_ids [1, s], alike on
    every tensor-parallel rank; each compares its own columns, without a collective of ours.
    Raises ConfigError when they differ by more than rounding.
    """
    input_ids = input_ids[:1, :_POSITIONS]
    if isinstance(target, HuggingFaceTarget):
        last_layer, last_hidden = _last_states(target, input_ids)
        causal = _without_layers(folder, target.dtype)
        own = causal(inputs_embeds=last_layer.cpu(), use_cache=False).logits
    else:
        own, last_hidden = target.own_logits(input_ids)
    own = own.float().cpu()
    ours = (last_hidden.to(lm_head.dtype) @ lm_head.t()).float().cpu()
    real = slice(shard.vocab_start_index, min(shard.vocab_end_index, shard.vocab_size))
    own = own[..., real]
    difference = (own - ours[..., : own.shape[-1]]).abs().amax().item() if own.numel() else 0.0
    scale = own.abs().amax().item() if own.numel() else 0.0
    # bf16 rounds hidden states and logits to 2^-8 of themselves; fp32 differs by summation order.
    exact = {lm_head.dtype, target.dtype} == {torch.float32}
    if not difference <= (1e-4 if exact else 0.02) * max(scale, 1.0):
        raise ConfigError(
            f"the target's own logits are not lm_head(last_hidden): they differ by "
            f"{difference:.3g} (largest logit {scale:.3g}). A target with a bias in its head, a "
            "logit scale or a soft cap is not supported; else its final norm or head was not "
            "loaded right"
        )


def _last_states(target: HuggingFaceTarget, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the last decoder layer and of the final norm, each [1, s, h]."""
    kept = []
    hook = target.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: kept.append(layer_output(output))
    )
    states = target.states(input_ids)
    hook.remove()
    # In several passes it comes in pieces, and what follows them is another rank's need of passes.
    return torch.cat(kept, dim=1)[:, : input_ids.shape[1]], states.last_hidden


def _without_layers(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The language-model class with embedding, final norm and head only, on the CPU."""
    config = without_layers(load_target_config(folder))
    is_text_only = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    family = AutoModelForCausalLM if is_text_only else AutoModelForImageTextToText
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # every layer's tensors are reported as unexpected
    try:
        return family.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager",
        ).eval()
    finally:
        transformers.logging.set_verbosity(verbosity)
