"""From a target's config and a machine to a layout and the YAML of a run."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from dspark_megatron.config import Config
from dspark_megatron.config.loading import config_from_dict, merged_sections, nested_overrides
from dspark_megatron.errors import require
from dspark_megatron.planning.dry_run import describe_plan
from dspark_megatron.planning.layouts import (
    GIB,
    SEARCHED,
    Candidate,
    Machine,
    best_layout,
    layout_words,
    layouts,
)
from dspark_megatron.run.check import RunPlan
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.stored.deepspec_layout import RECORD, DeepSpecLayout

TAPS = 5


@dataclass(frozen=True)
class Wish:
    """What the user says of the run; the defaults are the paper's."""

    target: str
    """The target's folder, or its `config.json`."""
    seq_length: int = 4096
    global_batch_size: int = 512
    micro_batch_size: int = 1
    samples: int | None = None
    """Training samples, for the size of their stored states."""
    overrides: list[str] = field(default_factory=list)
    """`section.key=value`"""


def recommend(wish: Wish, machine: Machine) -> str:
    """YAML of a run that fits the machine, with the plan as its comments. Raises ConfigError when
    the rules or the memory allow none."""
    machine.validate()
    _check(wish)
    folder = _folder(wish.target)
    target_config = load_target_config(folder)
    changes = nested_overrides(wish.overrides)
    sections = merged_sections(_sections(wish, folder, target_config, changes), changes)
    config = config_from_dict(sections)
    config.validate()
    asked = config.model.mask_token_id
    if asked is None:  # no size depends on it
        config.model.mask_token_id = _stand_in(target_config)
    fixed = {f"{section}.{key}" for section, keys in changes.items() for key in keys}
    found, refused = layouts(config, target_config, machine, fixed=fixed)
    best = best_layout(found, machine)
    lines = [
        f"{machine.nodes} node(s) of {machine.gpus_per_node} GPUs with {machine.gpu_memory_gib:g} "
        f"GiB, of which {machine.margin:g} are planned with",
        "",
        *candidate_lines(found, best),
        *(f"refused: TP {tp}: {why}" for tp, why in refused.items()),
        "",
        f"chosen: {layout_words(best.plan)}: of the layouts that fit the one that sends least",
        "",
        *describe_plan(best.plan).splitlines(),
        *stored_states_lines(best.plan, wish.samples),
    ]
    for candidate in found:
        candidate.plan.config.model.mask_token_id = asked
    comment = "\n".join(lines).splitlines()  # a folder's name may have several
    return "".join(f"# {line}".rstrip() + "\n" for line in comment) + _yaml(best.plan.config)


def evenly_spread_layers(num_layers: int, taps: int = TAPS) -> list[int]:
    """DeepSpec's choice: from the second layer to the third from the end."""
    last = num_layers - 3
    require(
        last >= taps,
        f"the target has {num_layers} layers, too few to spread {taps} taps over [1, {last}]; set "
        "model.target_layer_ids",
    )
    return [int(1 + i * (last - 1) / (taps - 1) + 0.5) for i in range(taps)]


def candidate_lines(found: list[Candidate], best: Candidate) -> list[str]:
    """One line for each way to split weights: its first layout that fits, or its leanest."""
    ways: dict[Any, list[Candidate]] = {}
    for candidate in found:
        split = candidate.plan.target_split
        ways.setdefault((split.tp_size, split.shards, split.ep_size), []).append(candidate)
    lines = ["  GiB/GPU  GiB sent/step in a node, between nodes  seconds at given rates  layout"]
    for way in sorted(ways):
        fitting = [candidate for candidate in ways[way] if candidate.fits]
        one = fitting[0] if fitting else min(ways[way], key=lambda c: c.memory.total)
        state = "chosen" if one is best else "fits" if one.fits else "too large"
        lines.append(
            f"{one.memory.total / GIB:9.1f} {one.sent_in_node / GIB:12,.1f} "
            f"{one.sent_between_nodes / GIB:12,.1f} {one.seconds:10,.2f}  "
            f"{layout_words(one.plan)}: {state}"
        )
    return lines


def _check(wish: Wish) -> None:
    require(
        wish.samples is None or wish.samples >= 1,
        f"samples ({wish.samples}) must be >= 1; leave it out for the size of one",
    )
    require(
        not any(text.startswith("target.path=") for text in wish.overrides),
        "target.path is the target that is planned for; name it as the target, not as an override",
    )


def _folder(path: str) -> str:
    given = Path(path)
    require(
        given.is_dir() or given.name == "config.json",
        f"the target ({path}) must be a folder with a config.json, or that file",
    )
    return str(given if given.is_dir() else given.parent)


def _sections(
    wish: Wish, folder: str, target_config: PretrainedConfig, changes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What the overrides are put on: the wish, and defaults for what a run must say."""
    name = Path(folder).resolve().name
    depth = target_config.get_text_config().num_hidden_layers
    has_taps = "target_layer_ids" in changes.get("model", {})
    taps = {} if has_taps else {"target_layer_ids": evenly_spread_layers(depth)}
    length = {} if "iterations" in changes.get("train", {}) else {"epochs": 10}
    return {
        "target": {"path": folder},
        "model": {**taps, "mask_token_id": None},
        "data": {"train_files": ["data/train.jsonl"], "max_length": wish.seq_length},
        "train": {
            "output_dir": f"runs/{name}-dspark",
            **length,
            "micro_batch_size": wish.micro_batch_size,
            "global_batch_size": wish.global_batch_size,
        },
    }


def _stand_in(target_config: PretrainedConfig) -> int:
    text = target_config.get_text_config()
    taken = {text.pad_token_id}
    taken |= set(text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id])
    return next(i for i in range(text.vocab_size) if i not in taken)


def _yaml(config: Config) -> str:
    """Keys that differ from the defaults, and what the user is to look at."""
    chosen = {}
    for section in dataclasses.fields(Config):
        values, plain = (getattr(c, section.name) for c in (config, Config()))
        shown = {
            entry.name: getattr(values, entry.name)
            for entry in dataclasses.fields(values)
            if getattr(values, entry.name) != getattr(plain, entry.name)
            or f"{section.name}.{entry.name}" in (*SEARCHED, "model.mask_token_id")
            or entry.name in ("max_length", "micro_batch_size")
        }
        if shown:
            chosen[section.name] = shown
    text = yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None)
    missing = "mask_token_id: null"
    hint = "  # to be set: an id that never occurs in the data, such as a reserved token"
    return text.replace(missing, missing + hint)


def stored_states_lines(plan: RunPlan, samples: int | None) -> list[str]:
    """What DeepSpec's layout of stored states would take, for samples of full length."""
    length, many = plan.config.data.max_length, f"{samples:,} samples" if samples else "1 sample"
    layout = DeepSpecLayout(plan.shape.hidden_size, plan.shape.target_layer_ids, "")
    size = (samples or 1) * (layout.sample_bytes(length) + RECORD.size)
    return [
        f"states kept on disk instead (DeepSpec's cache, bf16): {size / 2**30:,.3f} GiB for {many} "
        f"of {length} tokens; tools/prepare_target_cache.py says what its own layout takes of your "
        "data, and the run above computes them in every step",
    ]
