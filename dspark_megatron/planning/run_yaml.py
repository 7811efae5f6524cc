"""The YAML of a planned run: what differs from the defaults, and what its reader will look for."""

import dataclasses

import yaml

from dspark_megatron.config import Config
from dspark_megatron.errors import printable
from dspark_megatron.planning.layouts import SEARCHED
from dspark_megatron.planning.run_data import PlannedData

SHOWN = (
    *SEARCHED,
    *("model.mask_token_id", "data.max_length", "train.micro_batch_size"),
    *("optimizer.lr", "optimizer.schedule", "optimizer.warmup_ratio"),
)
"""Keys that are there even at their defaults."""


def run_yaml(config: Config, data: PlannedData | None, *, placeholder: str) -> str:
    """placeholder: the train_files that are to be replaced; empty where they are given."""
    chosen = {}
    for section in dataclasses.fields(Config):
        values, plain = (getattr(c, section.name) for c in (config, Config()))
        shown = {
            entry.name: getattr(values, entry.name)
            for entry in dataclasses.fields(values)
            if getattr(values, entry.name) != getattr(plain, entry.name)
            or f"{section.name}.{entry.name}" in SHOWN
        }
        if shown:
            chosen[section.name] = shown
    text = yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None)
    mask = "mask_token_id: null"
    hints = {mask: "to be set: an id that never occurs in the data, such as a reserved token"}
    if data is not None:
        hints = {f"mask_token_id: {data.mask.id}": printable(data.mask.words())}
    if placeholder:
        hints[f"train_files: [{placeholder}]"] = "to be set: your files"
    for line, hint in hints.items():
        text = text.replace(f"{line}\n", f"{line}  # {hint}\n")
    return text
