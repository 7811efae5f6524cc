"""Which layouts fit a machine, and which of them takes least time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from dspark_megatron.config import Config
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.planning.cost.machine import GIB, Machine
from dspark_megatron.planning.cost.run_cost import step_tokens
from dspark_megatron.planning.cost.step_time import StepTime, plan_step_time
from dspark_megatron.planning.memory import RankMemory, rank_memory
from dspark_megatron.planning.work import step_work
from dspark_megatron.run.check import RunPlan, check_family, planned_layout
from dspark_megatron.shape import draft_shape
from dspark_megatron.shape.layout import check_batch_size

SPLITS = (
    "parallel.tensor_parallel",
    "target.shard_across_data_parallel",
    "parallel.expert_parallel",
    "parallel.sequence_parallel",
)
RECOMPUTE, PASS = "train.recompute_activations", "target.samples_per_pass"
SEARCHED = (*SPLITS, RECOMPUTE, PASS)
"""Keys that the search sets, but for those that the user has set."""
GAIN = 0.001
"""The least share of a step's time for which a larger pass is looked at."""
OF_TARGETS = (*SPLITS[1:3], PASS)
"""Of these, what is nothing to a run on stored states."""


@dataclass(frozen=True)
class Candidate:
    """A layout that the rules allow."""

    plan: RunPlan
    memory: RankMemory
    sent_in_node: int
    sent_between_nodes: int
    fits: bool
    time: StepTime
    order: tuple[Any, ...] = field(compare=False)
    """The best comes first: least time; of equals the one that recomputes nothing, splits least and
    gathers least."""

    @property
    def tokens_per_second(self) -> float:
        return step_tokens(self.plan) / self.time.total


class NothingFits(ConfigError):
    """The rules allow layouts, and the memory none."""


def best_layout(candidates: list[Candidate], machine: Machine) -> Candidate:
    """NothingFits with the leanest of them when none fits."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if fitting:
        return min(fitting, key=lambda candidate: candidate.order)
    lean = min(candidates, key=lambda candidate: candidate.memory.total)
    raise NothingFits(
        f"no layout fits {machine.nodes} node(s) of {machine.gpus_per_node} GPUs: the leanest "
        f"({layout_words(lean.plan)}) takes {lean.memory.total / GIB:.1f} GiB a GPU, and "
        f"{machine.margin:g} x {machine.gpu_memory_gib:g} = {machine.usable_bytes / GIB:.1f} GiB "
        "are to be used; take more nodes, a smaller data.max_length, train.micro_batch_size=1, "
        "target.max_tokens_per_forward, fewer model.num_anchors or a smaller draft "
        f"(model.num_layers, model.ffn_hidden_size); {lean.memory.highest} takes most"
    )


def layout_words(plan: RunPlan) -> str:
    config = plan.config
    words = [f"TP {config.parallel.tensor_parallel} x DP {plan.dp_size}"]
    if plan.target_split.shards > 1:
        words.append(f"target shared by {plan.target_split.shards} data-parallel ranks")
    if config.parallel.expert_parallel > 1:
        words.append(f"EP {config.parallel.expert_parallel}")
    if plan.pass_size.micro_batches > 1:
        words.append(f"{plan.pass_size.samples} samples a pass of the target")
    if config.parallel.sequence_parallel:
        words.append("sequence parallel")
    if config.train.recompute_activations:
        words.append("recompute")
    return ", ".join(words)


def layouts(
    base: Config, target_config: Any, machine: Machine, *, fixed: set[str]
) -> tuple[list[Candidate], dict[int, str]]:
    """All layouts of the searched keys that the rules allow, the best first, and why a
    tensor-parallel size allows none. fixed: keys to leave as they are. Raises the first refusal
    when there is no layout at all."""
    require(
        base.target.provider != "megatron",
        "layouts are compared for target.provider=huggingface only, and it is megatron; leave it "
        "out, or look at one layout with --dry-run",
    )
    check_family(base, target_config)
    if base.target.is_stored:
        fixed = fixed | set(OF_TARGETS)
    shape = draft_shape(base.model, target_config)
    found: list[Candidate] = []
    refused: dict[int, str] = {}

    def candidate(config: Config) -> Candidate:
        plan = planned_layout(config, target_config, shape, machine.world_size)
        check_batch_size(config.train, plan.dp_size)
        return _candidate(plan, machine)

    for split in _splits(base, machine, fixed):
        try:
            found += _sizes(split, machine, fixed, candidate)
        except ConfigError as error:
            refused.setdefault(split.parallel.tensor_parallel, str(error))
    require(bool(found), next(iter(refused.values()), ""))
    allowed = {candidate.plan.target_split.tp_size for candidate in found}
    refused = {tp: why for tp, why in refused.items() if tp not in allowed}
    return sorted(found, key=lambda candidate: candidate.order), refused


def _splits(base: Config, machine: Machine, fixed: set[str]) -> Iterator[Config]:
    """Tensor parallelism stays within a node. The target is held whole, shared within a node or
    shared by all; its experts are split as the rest, or whole ones are spread over the
    tensor-parallel ranks or over all that share the target."""
    gpus, world = machine.gpus_per_node, machine.world_size
    tp_key, shards_key, ep_key, rows_key = SPLITS
    for tp in _choices(base, tp_key, [n for n in range(1, gpus + 1) if gpus % n == 0], fixed):
        sharing = sorted({1, max(1, gpus // tp), max(1, world // tp)})
        rows = _choices(base, rows_key, [False, True] if tp > 1 else [False], fixed)
        for shards in _choices(base, shards_key, sharing, fixed):
            spread = sorted({1, tp, tp * (shards or max(1, world // tp))})
            for ep, split in product(_choices(base, ep_key, spread, fixed), rows):
                values = (tp, shards, ep, split)
                yield _changed(base, dict(zip(SPLITS, values, strict=True)))


def _sizes(
    split: Config, machine: Machine, fixed: set[str], candidate: Callable[[Config], Candidate]
) -> list[Candidate]:
    """Of one split: ever more samples in a pass of the target, until they do not fit or gain
    nothing, and the same with recomputation where memory was the end."""
    train, found = split.train, []
    a_rank = train.global_batch_size * split.parallel.tensor_parallel // machine.world_size
    growing = [train.micro_batch_size]
    while 2 * growing[-1] <= a_rank:
        growing.append(2 * growing[-1])
    for recompute in _choices(split, RECOMPUTE, [False, True], fixed):
        before = math.inf
        for samples in _choices(split, PASS, growing, fixed):
            one = candidate(_changed(split, {RECOMPUTE: recompute, PASS: samples}))
            found.append(one)
            gained, before = before - one.time.total, one.time.total
            if not one.fits or gained < GAIN * before:
                break
        if one.fits:
            break
    return found


def _choices(base: Config, key: str, values: list[Any], fixed: set[str]) -> list[Any]:
    section, name = key.split(".")
    return [getattr(getattr(base, section), name)] if key in fixed else values


def _changed(config: Config, values: dict[str, Any]) -> Config:
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def _candidate(plan: RunPlan, machine: Machine) -> Candidate:
    memory, work, sent = rank_memory(plan), step_work(plan), {True: 0, False: 0}
    for one in work.sent:
        sent[one.span <= machine.gpus_per_node] += one.sent
    time, split = plan_step_time(plan, work, machine), plan.config.parallel
    order = (
        time.total,
        plan.config.train.recompute_activations,
        split.tensor_parallel,
        plan.target_split.shards,
        split.expert_parallel,
        plan.pass_size.samples,
    )
    fits = memory.total <= machine.usable_bytes
    return Candidate(plan, memory, sent[True], sent[False], fits, time, order)
