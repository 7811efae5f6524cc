"""Targets that are saved quantized: Transformers' own quantizer of the method, and what it needs.

The quantization of a target's `config.json` goes to Transformers untouched.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from dspark_megatron.errors import ConfigError, require
from dspark_megatron.targets.huggingface.split import (
    TargetSplit,
    meta_target,
    split_dimension,
    style_of,
)


def quantization_method(target_config: PretrainedConfig) -> str | None:
    """The name of the method, None for a target that is not quantized."""
    settings = _settings(target_config)
    return None if settings is None else settings.get("quant_method", "unnamed")


def quantizer_of(target_config: PretrainedConfig) -> Any:
    """Transformers' quantizer of the method. ConfigError where Transformers has none, or not
    without a package that is not installed."""
    settings = _settings(target_config)
    with _in_words(target_config):
        if not AutoHfQuantizer.supports_quant_method(settings):
            raise ValueError("Transformers does not know this method")
        return AutoHfQuantizer.from_config(settings, pre_quantized=True)


def check_quantization(target_config: PretrainedConfig, split: TargetSplit) -> None:
    """ConfigError unless this machine can run the target as it is saved (or Transformers can
    dequantize it while it loads), split so."""
    if quantization_method(target_config) is None:
        return
    quantizer = quantizer_of(target_config)
    with _in_words(target_config):
        quantizer.validate_environment(device_map=None, weights_only=True)
    if quantization_method(target_config) == "fp8":
        dequantizes = quantizer.quantization_config.dequantize
        _check_blocks(target_config, split, with_shards=dequantizes)


def _check_blocks(
    target_config: PretrainedConfig, split: TargetSplit, *, with_shards: bool
) -> None:
    """Transformers cuts a matrix and the scales of its blocks independently: a cut through a block
    gives wrong weights without an error. with_shards: cuts of sharding matter, too, because the
    parts are dequantized before they are put together."""
    quantizer = quantizer_of(target_config)
    block = quantizer.quantization_config.weight_block_size
    if block is None:
        return
    model = copy.deepcopy(meta_target(target_config, torch.bfloat16))
    quantizer.preprocess_model(model=model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if f"{name}_scale_inv" not in parameters:
            continue
        ways = [1] * parameter.dim()
        style = style_of(name, model.tp_plan)
        dimension = split_dimension(style, parameter)
        if dimension is not None and not (split.ep_size > 1 and style_of(name, model.ep_plan)):
            ways[dimension] = split.tp_size * (2 if style.startswith("packed") else 1)
        if with_shards and parameter.dim() == 2:
            ways[0] *= split.shards
        for size, cuts, width in zip(parameter.shape[-2:], ways[-2:], block, strict=True):
            require(
                cuts == 1 or size % (cuts * width) == 0,
                f"{name} of the target ({size} wide, fp8 in blocks of {width}) must be cut between "
                f"blocks, and {size} / {cuts} is no multiple of {width}; lower "
                "parallel.tensor_parallel or target.shard_across_data_parallel, or save the target "
                "dequantized and set target.path to that folder",
            )


@contextmanager
def _in_words(target_config: PretrainedConfig) -> Iterator[None]:
    """Turns what Transformers says of a missing package or device into a ConfigError."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the target is quantized ({quantization_method(target_config)}), and this machine "
            f"cannot run it: {str(error).rstrip('.')}. Install what is missing, or save the target "
            "dequantized and set target.path to that folder"
        ) from error


def _settings(target_config: PretrainedConfig) -> dict[str, Any] | None:
    for part in (target_config, target_config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            return settings if isinstance(settings, dict) else settings.to_dict()
    return None
