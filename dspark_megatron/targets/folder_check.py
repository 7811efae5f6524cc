"""Whether a target's folder holds the weights that its config.json describes: names, and the shapes
of the embedding and the first layer. Reads headers of at most a few files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, PretrainedConfig

from dspark_megatron.errors import require
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder, has_safetensors
from dspark_megatron.storage.target_folder import shared_weights
from dspark_megatron.targets.huggingface.split import meta_target

_SHOWN = 4
"""Differences that are named."""


def check_weights_described(folder: str | Path, target_config: PretrainedConfig) -> None:
    """ConfigError where the weights are of another size than config.json says, which Transformers
    would find after the load or, for layers too many, never. A folder without weights passes."""
    if not has_safetensors(Path(folder)):
        return
    files = SafetensorsFolder(folder)
    problems = [*_of_embedding(files, target_config), *_of_layers(files, target_config)]
    if not problems and getattr(target_config, "quantization_config", None) is None:
        problems = list(_of_first_layer(files, target_config))
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    require(
        not problems,
        f"the weights in {folder} are not those that its config.json describes: "
        f"{'; '.join(problems[:_SHOWN])}{more}; copy the folder again, or mend config.json",
    )


def _of_embedding(files: SafetensorsFolder, config: PretrainedConfig) -> Iterator[str]:
    text: Any = config.get_text_config()
    said = [text.vocab_size, text.hidden_size]
    for name in set(shared_weights(files.path)):
        found = list(files.shape(name))
        if found != said:
            yield f"{name} is {found}, and vocab_size x hidden_size is {said}"


def _of_layers(files: SafetensorsFolder, config: PretrainedConfig) -> Iterator[str]:
    text: Any = config.get_text_config()
    prefix = shared_weights(files.path)[0].rpartition("embed_tokens")[0]
    numbers = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    found = {int(match[1]) for name in files.files if (match := numbers.match(name))}
    said, extra = text.num_hidden_layers, getattr(text, "num_nextn_predict_layers", None) or 0
    if found and not said <= max(found) + 1 <= said + extra:
        yield f"there are {max(found) + 1} layers, and num_hidden_layers is {said}"


def _of_first_layer(files: SafetensorsFolder, config: PretrainedConfig) -> Iterator[str]:
    """Of families whose names in the folder are those of the class."""
    if type(config) not in MODEL_MAPPING:
        return
    model = meta_target(config, torch.bfloat16)
    for name, parameter in model.named_parameters():
        full = f"{model.base_model_prefix}.{name}"
        if ".0." not in f".{name}" or full not in files.files:
            continue
        found, said = list(files.shape(full)), list(parameter.shape)
        if sorted(found) != sorted(said):  # Transformers turns matrices of some families
            yield f"{full} is {found}, and would be {said}"
