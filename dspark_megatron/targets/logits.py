"""How a target's family makes its logits: `cap(scale * lm_head(x))`, as its config says in words of
its own, and as its class shows. Known before any weight is read.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from dspark_megatron.errors import require
from dspark_megatron.ops.logit_transform import LogitTransform
from dspark_megatron.targets.family import without_layers

_SCALES: tuple[tuple[str, str, Callable[[float], float]], ...] = (
    ("logit_scale", "cohere", lambda value: value),
    ("logits_scaling", "granite|minicpm3", lambda value: 1 / value),
    ("logits_scaling", "hyperclovax", lambda value: value),
    ("lm_head_multiplier", "falcon_h1", lambda value: value),
    ("logits_mup_width_multiplier", "inkling", lambda value: 1 / value),
    ("output_multiplier", "muse_", lambda value: value),
)
"""Keys of a scale, families that have them (starts of their model_type), and the scale. A family
that divides its last hidden state before the head divides its logits."""
_CAPS = (
    (
        "final_logit_softcapping",
        "gemma|vaultgemma|nanochat|beam|inkling2|mistral_large4|muse_|diffusion_gemma",
    ),
    ("logits_soft_cap", "recurrent_gemma"),
    ("output_logit_soft_cap", "xlstm"),
)
_LOGIT_KEYS = re.compile("logit|lm_head|dim_model_base|output_multiplier|unpadded_vocab_size")
_NOT_OF_LOGITS = re.compile(
    "router|^attn_|^attention_|_to_keep$|^freeze_|^chunk_size_|lm_head_bias"
)
"""Of other logits, and of how a class computes; a head's bias is seen in its class."""
_TRIAL_VOCABULARY = 64
_TRIAL_PARAMETERS = 10**8
"""Of a model that is tried, at most: a vision tower would be larger."""


def logit_transform(target_config: PretrainedConfig) -> LogitTransform:
    """What a target does to the product of its head. ConfigError for a key that its family is not
    known to have, and for a number that cannot be one."""
    text = target_config.get_text_config()
    family, understood = text.model_type, set()
    scale, softcapping = 1.0, None
    for key, families, scale_of in _SCALES:
        if re.match(families, family) and (value := getattr(text, key, None)) is not None:
            understood.add(key)
            scale *= scale_of(_positive(key, value))
    for key, families in _CAPS:
        if re.match(families, family) and (value := getattr(text, key, None)) is not None:
            understood.add(key)
            softcapping = _positive(key, value)
    if "logits_scaling" in understood:
        understood.add("dim_model_base")  # MiniCPM's is hidden_size over it
    unknown = {
        key: value
        for key, value in text.to_dict().items()
        if key not in understood and _changes_logits(key, value, text)
    }
    require(
        not unknown,
        f"the target's config ({family}) says {unknown} of its logits, which this project does not "
        "know of its family; take the key out of its config.json if nothing reads it, else take "
        "another target",
    )
    return LogitTransform(scale, softcapping)


def _positive(key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        is_number and 0 < value < math.inf,
        f"{key} of the target's config ({value!r}) must be a number above 0; mend its config.json, "
        "where null means none",
    )
    return float(value)


def _changes_logits(key: str, value: Any, text: PretrainedConfig) -> bool:
    if not _LOGIT_KEYS.search(key) or _NOT_OF_LOGITS.search(key):
        return False
    if key == "unpadded_vocab_size":  # its class leaves out the logits of the rows above
        return value is not None and value < text.vocab_size
    is_one = not isinstance(value, bool) and value == 1 and "cap" not in key
    return not (value is None or value is False or is_one)


@dataclass(frozen=True)
class _Trial:
    """Of a class with random weights."""

    difference: float
    """Of its logits from ours, at most, in units of the largest."""
    has_bias: bool
    """Its head."""


def check_logits(target_config: PretrainedConfig) -> None:
    """ConfigError where the family's logits are not what `logit_transform` says of its config, as
    the loss makes them: tried on its own class with random weights, no layers and a small
    vocabulary. A family whose class cannot be tried so is left to the check of the loaded target.
    """
    transform, text = logit_transform(target_config), target_config.get_text_config()
    configs = [text] if text is target_config else [text, target_config]
    for trial in filter(None, (_tried(config, transform) for config in configs)):
        why = "its head has a bias" if trial.has_bias else f"they differ by {trial.difference:.2g}"
        require(
            trial.difference < 1e-3,
            f"the target's family ({target_config.model_type}) does not make its logits as "
            f"{transform.describe()} of its last hidden states: {why} of the largest; a bias in "
            "the head, and a scale or a soft cap that its class applies and its config does not "
            "say, or the other way round, are not supported; take another target",
        )


def _tried(target_config: PretrainedConfig, transform: LogitTransform) -> _Trial | None:
    """None where it cannot be told."""
    if type(target_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    config = copy.deepcopy(target_config)
    text = config.get_text_config()
    try:
        text.vocab_size = _TRIAL_VOCABULARY
        text.pad_token_id = text.bos_token_id = text.eos_token_id = 0
        model = _random_model(without_layers(config))
        head = model.get_output_embeddings()
        _, product = _logits(model)
        # Where a cap bends: far below it any is none, far above it any scale is the same.
        middle = transform.softcapping or 1.0
        head.weight.mul_(middle / transform.scale / product.std())
        own, product = _logits(model)
    except Exception:  # a class may need whatever it needs
        return None
    ours = transform.apply_(product)
    difference = ((own - ours).abs().max() / own.abs().max()).item()
    has_bias = getattr(head, "bias", None) is not None
    return _Trial(difference, has_bias) if math.isfinite(difference) else None


def _random_model(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        size = sum(parameter.numel() for parameter in model.parameters())
    if size > _TRIAL_PARAMETERS:
        raise ValueError(f"{size} parameters are too many for a trial")
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False).normal_(generator=generator)
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of a model, and the product of its last hidden state and its head."""
    states = []
    base = model.get_decoder()
    base = model.model if base is model else base
    hook = base.register_forward_hook(lambda *call: states.append(call[-1][0]))
    logits = model(input_ids=torch.arange(_TRIAL_VOCABULARY)[None], use_cache=False).logits
    hook.remove()
    return logits, states[0] @ model.get_output_embeddings().weight.t()
