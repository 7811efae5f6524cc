"""The floating-point operations of the target's forward pass, by the sizes of its own modules."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from dspark_megatron.errors import ConfigError
from dspark_megatron.shape import layer_values
from dspark_megatron.targets.huggingface.split import meta_target
from dspark_megatron.targets.huggingface.target import decoder_layers

CHOSEN = ("num_experts_per_tok", "top_k_experts")
"""What families call the number of experts that a token goes through."""


@dataclass(frozen=True)
class TargetFlops:
    """2 a token for each weight of a matrix that it goes through, and for each pair of a token and
    one that it sees 2 for each width of a query head and of a value head."""

    weights: int
    pairs: dict[tuple[int, int | None], int]
    """How many layers have this sum of widths and this window (None: all tokens before)."""

    @classmethod
    def of(cls, target_config: PretrainedConfig, last_layer: int | None) -> "TargetFlops | None":
        """None where Transformers cannot build the family, or its modules do not say enough.
        last_layer: the last that runs; None: all do."""
        try:
            model = meta_target(target_config, torch.bfloat16)
            layers = list(decoder_layers(model))
        except ConfigError:
            return None
        text = target_config.get_text_config()
        layers = layers[: None if last_layer is None else last_layer + 1]
        weights = [n for layer in layers if (n := _weights(layer, text)) is not None]
        pairs = Counter(pair for layer in layers if (pair := _pair(layer, text)) is not None)
        if len(weights) < len(layers) or not pairs:
            return None
        return cls(sum(weights), pairs)

    def of_lengths(self, lengths: Sequence[int]) -> int:
        """Of samples with so many tokens."""
        seen = {window: sum(_seen(n, window) for n in lengths) for _, window in self.pairs}
        products = (count * 2 * w * seen[window] for (w, window), count in self.pairs.items())
        return 2 * sum(lengths) * self.weights + sum(products)


def _seen(tokens: int, window: int | None) -> int:
    """Pairs of a token and one that it sees: itself and those before, as far as the window goes."""
    inside = tokens if window is None else min(tokens, window)
    return inside * (inside + 1) // 2 + (tokens - inside) * inside


def _weights(layer: nn.Module, text: PretrainedConfig) -> int | None:
    """Of the matrices that a token goes through: of experts, which lie in one tensor with three
    dimensions, as many as are chosen. None where the config does not say how many,
    or where they lie otherwise."""
    chosen = next((n for name in CHOSEN if (n := _of_all_layers(text, name))), 0)
    total = 0
    for name, parameter in layer.named_parameters():
        is_expert = "experts" in name.split(".") and not name.endswith("bias")
        if is_expert and (not chosen or parameter.dim() != 3):
            return None
        if is_expert:
            total += parameter.numel() // len(parameter) * chosen
        elif name.endswith("weight") and parameter.dim() == 2:
            total += parameter.numel()
    return total


def _pair(layer: nn.Module, text: PretrainedConfig) -> tuple[int, int | None] | None:
    """Widths of all query heads and of all value heads together, and the window. None for a layer
    without softmax attention."""
    attention = getattr(layer, "self_attn", None)
    if not isinstance(output := getattr(attention, "o_proj", None), nn.Linear):
        return None
    values = queries = output.in_features
    if latent := _of_all_layers(text, "qk_head_dim"):
        queries = latent * (_of_all_layers(text, "num_attention_heads") or 0)
    of_all = _of_all_layers(text, "sliding_window")  # what a family has that names none by layer
    return queries + values, getattr(attention, "sliding_window", of_all)


def _of_all_layers(text: PretrainedConfig, name: str) -> int | None:
    """What the config says of a key; None where it says nothing, or layers differ."""
    values = layer_values(text, name)
    return values.pop() if len(values) == 1 else None
