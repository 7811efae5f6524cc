"""From a target's config and a machine to a layout and the YAML of a run."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dspark_megatron.config import Config
from dspark_megatron.config.loading import config_from_dict, merged_sections, nested_overrides
from dspark_megatron.data.files.sources import check_apart, find_files
from dspark_megatron.data.prompts.prompt_sets import find_prompts
from dspark_megatron.errors import printable, require
from dspark_megatron.planning.cost.describe import time_lines
from dspark_megatron.planning.cost.machine import GIB, Machine
from dspark_megatron.planning.cost.run_cost import Bill, cost_lines
from dspark_megatron.planning.cost.store import store_cost, store_lines
from dspark_megatron.planning.dry_run import describe_plan
from dspark_megatron.planning.layouts import Candidate, best_layout, layout_words, layouts
from dspark_megatron.planning.run_data import PlannedData, read_data
from dspark_megatron.planning.run_yaml import run_yaml
from dspark_megatron.storage.target_folder import load_target_config

TAPS = 5
LENGTH, ROUND = 4096, 64
"""Tokens of a sample in the paper, and of what a shorter one is made a multiple."""
TRAIN_FILE = "data/train.jsonl"
"""Stands in the YAML where no data are given."""


@dataclass(frozen=True)
class Wish:
    """What the user says of the run; the defaults are the paper's."""

    target: str
    """The target's folder, or its `config.json`."""
    seq_length: int | None = None
    """Null is the paper's 4096, or less where the longest sample of `data` has less."""
    global_batch_size: int = 512
    micro_batch_size: int = 1
    bill: Bill = field(default_factory=Bill)
    overrides: list[str] = field(default_factory=list)
    """`section.key=value`"""
    taps: int = TAPS
    """How many layers of the target feed the draft, where no override names them."""
    data: list[str] = field(default_factory=list)
    """Entries of data.train_files, which are read. Empty: only the layout is planned."""
    prompts: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    show_progress: bool = False


@dataclass(frozen=True)
class Search:
    """The layouts of a wish."""

    wish: Wish
    machine: Machine
    target_config: PretrainedConfig
    asked: Config
    """Before anything was chosen."""
    fixed: set[str]
    """Keys that the wish sets."""
    found: list[Candidate]
    refused: dict[int, str]
    """Tensor-parallel sizes that the rules do not allow, with the reason."""
    best: Candidate
    bill: Bill
    data: PlannedData | None


def search(wish: Wish, machine: Machine) -> Search:
    """Raises ConfigError when the rules or the memory allow no layout."""
    machine.validate()
    _check(wish)
    folder = _folder(wish.target)
    target_config = load_target_config(folder)
    changes = nested_overrides(wish.overrides)
    sections = merged_sections(_sections(wish, folder, target_config, changes), changes)
    config = config_from_dict(sections)
    config.validate()
    asked, data, bill = config, None, wish.bill
    fixed = {f"{section}.{key}" for section, keys in changes.items() for key in keys}
    if wish.data:
        data = read_data(asked, show_progress=wish.show_progress)
        asked = config = _shortened(data, wish, fixed)
        bill = replace(bill, samples=data.report.kept)
    if asked.model.mask_token_id is None:  # no size depends on it
        mask = _stand_in(target_config)
        config = replace(asked, model=replace(asked.model, mask_token_id=mask))
    found, refused = layouts(config, target_config, machine, fixed=fixed)
    best = best_layout(found, machine)
    return Search(wish, machine, target_config, asked, fixed, found, refused, best, bill, data)


def recommend(wish: Wish, machine: Machine) -> str:
    """YAML of a run that fits the machine, with the plan as its comments. Raises ConfigError when
    the rules or the memory allow none."""
    return run_text(search(wish, machine))


def run_text(done: Search) -> str:
    """The YAML, with the plan as its comments."""
    best, bill, machine = done.best, done.bill, done.machine
    lines = [
        *(done.data.lines() if done.data else []),
        f"{machine.nodes} node(s) of {machine.gpus_per_node} GPUs with {machine.gpu_memory_gib:g} "
        f"GiB, of which {machine.margin:g} are planned with",
        "",
        *candidate_lines(done.found, best),
        *(f"refused: TP {tp}: {why}" for tp, why in done.refused.items()),
        "",
        f"chosen: {layout_words(best.plan)}: of the layouts that fit the one that takes least time",
        "",
        *describe_plan(best.plan).splitlines(),
        "",
        *time_lines(best.time, machine, best.plan),
        *cost_lines(best.plan, best.time, bill, machine.world_size),
        *stored_lines(done),
    ]
    comment = "\n".join(lines).splitlines()  # a folder's name may have several
    config = replace(best.plan.config, model=done.asked.model)  # without the stand-in
    head = "".join(f"# {printable(line)}".rstrip() + "\n" for line in comment)
    return head + run_yaml(config, done.data, placeholder=_placeholder(done))


def evenly_spread_layers(num_layers: int, taps: int = TAPS) -> list[int]:
    """DeepSpec's choice: from the second layer to the third from the end."""
    last = num_layers - 3
    require(
        taps >= 2, f"--taps ({taps}) must be at least 2; set model.target_layer_ids for one tap"
    )
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
    lines = [f"{'GiB/GPU':>9} {'seconds':>10} {'tokens/s':>11} {'GiB in node':>12} {'between':>10}"]
    lines[0] += "  layout (a step; arithmetic)"
    for way in sorted(ways):
        fitting = [candidate for candidate in ways[way] if candidate.fits]
        one = fitting[0] if fitting else min(ways[way], key=lambda c: c.memory.total)
        state = "chosen" if one is best else "fits" if one.fits else "too large"
        lines.append(
            f"{one.memory.total / GIB:9.1f} {one.time.total:10,.2f} {one.tokens_per_second:11,.0f} "
            f"{one.sent_in_node / GIB:12,.1f} {one.sent_between_nodes / GIB:10,.1f}  "
            f"{layout_words(one.plan)}: {state}"
        )
    return lines


def _check(wish: Wish) -> None:
    wish.bill.validate()
    require(
        not wish.data or wish.bill.samples is None,
        f"--samples ({wish.bill.samples}) are counted in the files of --data; leave out either",
    )
    require(
        not (wish.data and any(text.startswith("data.train_files=") for text in wish.overrides)),
        "data.train_files are the files of --data; leave out either",
    )
    for entry in (*wish.data, *wish.held_out):
        find_files(entry)
    for entry in wish.prompts:
        find_prompts(entry)
    check_apart(wish.data, wish.held_out)
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
    taps = {} if has_taps else {"target_layer_ids": evenly_spread_layers(depth, wish.taps)}
    held_out = {"heldout_files": wish.held_out, "every": 500} if wish.held_out else {}
    length = {} if "iterations" in changes.get("train", {}) else {"epochs": 10}
    return {
        "target": {"path": folder},
        "model": {**taps, "mask_token_id": None},
        "data": {"train_files": wish.data or [TRAIN_FILE], "max_length": wish.seq_length or LENGTH},
        "train": {
            "output_dir": f"runs/{name}-dspark",
            **length,
            "micro_batch_size": wish.micro_batch_size,
            "global_batch_size": wish.global_batch_size,
        },
        "evaluate": {"prompt_files": wish.prompts, **held_out},
    }


def _shortened(data: PlannedData, wish: Wish, fixed: set[str]) -> Config:
    """Planned for the length that the samples have, if nobody has said another."""
    config = data.config
    if wish.seq_length is not None or "data.max_length" in fixed:
        return config
    longest = min(LENGTH, -(-data.longest // ROUND) * ROUND)
    return replace(config, data=replace(config.data, max_length=longest))


def _placeholder(done: Search) -> str:
    """The train_files that the user is to replace; empty where they are said."""
    return "" if done.wish.data or "data.train_files" in done.fixed else TRAIN_FILE


def _stand_in(target_config: PretrainedConfig) -> int:
    text = target_config.get_text_config()
    taken = {text.pad_token_id}
    taken |= set(text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id])
    return next(i for i in range(text.vocab_size) if i not in taken)


def stored_lines(done: Search) -> list[str]:
    """What a store of the target's states would take and gain; none where the run reads one."""
    if done.best.plan.config.target.is_stored:
        return []
    samples = done.bill.samples or 10**6
    reader, rates = reading_layout(done), done.machine.rates
    cost = store_cost(done.best.plan, done.best.time, reader.time, samples, rates)
    return store_lines(cost, samples, layout_words(reader.plan), rates)


def reading_layout(done: Search) -> Candidate:
    """The best layout of a run on stored states: without the target others may be better."""
    config = done.best.plan.config
    reading = replace(
        config,
        target=replace(config.target, provider="cache", shard_across_data_parallel=1),
        parallel=replace(config.parallel, expert_parallel=1),
    )
    found, _ = layouts(reading, done.target_config, done.machine, fixed=done.fixed)
    return best_layout(found, done.machine)
