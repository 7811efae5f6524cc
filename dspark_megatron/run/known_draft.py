"""The model section of a config from what is known of the draft: its checkpoint, or nothing."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dspark_megatron.config import Config, ModelConfig
from dspark_megatron.config.attention import AttentionConfig
from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.run.initial.initial_weights import is_draft_folder
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.rope import draft_rope
from dspark_megatron.storage.checkpoints.tracker import BEST
from dspark_megatron.storage.target_folder import load_target_config, load_tokenizer, stop_token_ids
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint


def evaluated_draft(config: Config) -> Path | None:
    """The `iter_*` folder, or the folder of a draft in any layout, that is evaluated; None for the
    untrained draft."""
    settings = config.evaluate
    if settings.untrained:
        return None
    named = settings.checkpoint or config.train.output_dir
    require(
        bool(named),
        "evaluate.checkpoint is missing; name a run, a checkpoint or the folder of a draft (or set "
        "evaluate.untrained=true)",
    )
    if not is_draft_folder(Path(named)):
        return find_checkpoint(named, BEST if settings.best else None)
    require(
        not settings.best and settings.weights == "trained",
        f"{named} is the folder of a draft, which holds its weights once; leave evaluate.best and "
        "evaluate.weights out, or name a run",
    )
    return Path(named)


def with_draft_of(config: Config, draft: Path) -> Config:
    """The config with the draft of a checkpoint or a folder wherever the model section is at its
    defaults; other values stay, and are compared with the draft's as a run's are."""
    folder = is_draft_folder(draft)
    reader = _draft_folder(draft, config) if folder else CheckpointReader(draft)
    return _with_shape(config, reader.shape)


def without_draft(config: Config, keep: Collection[str] = ()) -> Config:
    """The config with the model keys that a draft's shape decides at their defaults, but for those
    to keep."""
    decided = {field.name for field in dataclasses.fields(DraftShape)}
    decided |= {"initialize_from_target_layers"}  # a layer of the target for each of the draft
    plain = ModelConfig()
    changes = {
        field.name: getattr(plain, field.name)
        for field in dataclasses.fields(plain)
        if field.name in decided and field.name not in keep
    }
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def with_initial_draft(config: Config) -> Config:
    """The config with the draft of `train.initial_checkpoint` wherever the model section is at its
    defaults."""
    shape = _named_shape(config)
    assert shape is not None, "train.initial_checkpoint names it"
    return _with_shape(config, shape)


def with_some_draft(config: Config) -> Config:
    """For what needs the target and its data alone. A model section that names no taps or mask
    token is filled up: from the checkpoint that the config names or has, or else with a draft that
    stands in, of which no figure is told."""
    if config.model.target_layer_ids and config.model.mask_token_id is not None:
        return config
    shape = _named_shape(config)
    return _with_shape(config, shape) if shape is not None else _with_stand_in(config)


def _named_shape(config: Config) -> DraftShape | None:
    named = config.evaluate.checkpoint or config.train.initial_checkpoint
    if named and (Path(named) / "config.json").is_file():
        return _draft_folder(Path(named), config).shape
    run = Path(config.train.output_dir)
    if not named and not (config.train.output_dir and (run / "checkpoints").is_dir()):
        return None
    return CheckpointReader(find_checkpoint(named or run)).shape


def _draft_folder(path: Path, config: Config) -> DraftFolder:
    target = config.target.path
    facts = TargetFacts.of(load_target_config(target), Path(target).resolve().name)
    return DraftFolder(path, target=facts)


def _with_shape(config: Config, shape: DraftShape) -> Config:
    known = shape.to_dict()
    known["rope_parameters"] = _own_rope(config, shape)
    known["attention"] = shape.attention.config(shape.num_layers) or AttentionConfig()
    return _filled(config, known)


def _own_rope(config: Config, shape: DraftShape) -> dict[str, Any] | None:
    """The draft's RoPE where it is not the target's."""
    text = load_target_config(config.target.path).get_text_config()
    try:
        if draft_rope(None, text) == shape.rope_parameters:
            return None
    except ConfigError:  # the target has none that a draft could take over
        pass
    return shape.rope_parameters


def _with_stand_in(config: Config) -> Config:
    path, tp = config.target.path, config.parallel.tensor_parallel
    text, tokenizer = load_target_config(path).get_text_config(), load_tokenizer(path)
    special = {text.pad_token_id, tokenizer.pad_token_id, *stop_token_ids(path, tokenizer)}
    last = range(text.vocab_size - 1, -1, -1)  # where reserved tokens are
    stand_in = {
        "target_layer_ids": [0],
        "mask_token_id": next(token for token in last if token not in special),
        "ffn_hidden_size": text.hidden_size,
        "num_attention_heads": tp,
        "num_key_value_heads": tp,
        "head_dim": 64,
        "rope_parameters": {"rope_theta": 10000.0},
    }
    return _filled(config, stand_in)


def _filled(config: Config, known: dict[str, Any]) -> Config:
    """Keys of the model section that are at their defaults, where they are known."""
    plain = ModelConfig()
    changes = {
        field.name: known[field.name]
        for field in dataclasses.fields(plain)
        if field.name in known and getattr(config.model, field.name) == getattr(plain, field.name)
    }
    filled = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    filled.validate(trains=False)
    return filled
