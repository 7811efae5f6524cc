"""Which layouts fit a machine, and which of them sends least."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from dspark_megatron.config import Config
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.planning.memory import RankMemory, rank_memory
from dspark_megatron.planning.work import step_work
from dspark_megatron.run.check import RunPlan, check_family, planned_layout
from dspark_megatron.shape import draft_shape
from dspark_megatron.shape.layout import check_batch_size

GIB = 2**30
SEARCHED = (
    "parallel.tensor_parallel",
    "target.shard_across_data_parallel",
    "parallel.expert_parallel",
    "train.recompute_activations",
    "parallel.sequence_parallel",
)
"""Keys that the search sets, but for those that the user has set."""


@dataclass(frozen=True)
class Machine:
    gpus_per_node: int
    nodes: int
    gpu_memory_gib: float
    margin: float = 0.9
    """Share of the memory that a plan may fill: what is not planned needs the rest."""
    node_gb_per_s: float = 450.0
    """A GPU's, in one direction within a node (NVLink of an H100, by its data sheet)."""
    network_gb_per_s: float = 50.0
    """A GPU's, in one direction between nodes (400 Gb/s)."""

    def validate(self) -> None:
        for name in ("gpus_per_node", "nodes"):
            require(getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be >= 1")
        for name in ("gpu_memory_gib", "node_gb_per_s", "network_gb_per_s"):
            require(getattr(self, name) > 0, f"{name} ({getattr(self, name):g}) must be > 0")
        require(
            0 < self.margin <= 1,
            f"margin ({self.margin:g}), the share of a GPU's memory that is planned with, must be "
            "in (0, 1]",
        )

    @property
    def world_size(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def usable_bytes(self) -> float:
        return self.gpu_memory_gib * self.margin * GIB


@dataclass(frozen=True)
class Candidate:
    """A layout that the rules allow."""

    plan: RunPlan
    memory: RankMemory
    sent_in_node: int
    sent_between_nodes: int
    fits: bool
    seconds: float
    """What is sent in a step at the machine's rates: an order of preference, no forecast."""
    order: tuple[Any, ...] = field(compare=False)
    """The best comes first: least communication; of equals the one that recomputes nothing, splits
    least and gathers least."""


def best_layout(candidates: list[Candidate], machine: Machine) -> Candidate:
    """ConfigError with the leanest of them when none fits."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if fitting:
        return min(fitting, key=lambda candidate: candidate.order)
    lean = min(candidates, key=lambda candidate: candidate.memory.total)
    raise ConfigError(
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
    shape = draft_shape(base.model, target_config)
    found: list[Candidate] = []
    refused: dict[int, str] = {}
    for config in _configs(base, machine, fixed):
        tp = config.parallel.tensor_parallel
        try:
            plan = planned_layout(config, target_config, shape, machine.world_size)
            check_batch_size(config.train, plan.dp_size)
            found.append(_candidate(plan, machine))
        except ConfigError as error:
            refused.setdefault(tp, str(error))
    require(bool(found), next(iter(refused.values()), ""))
    allowed = {candidate.plan.target_split.tp_size for candidate in found}
    refused = {tp: why for tp, why in refused.items() if tp not in allowed}
    return sorted(found, key=lambda candidate: candidate.order), refused


def _configs(base: Config, machine: Machine, fixed: set[str]) -> Iterator[Config]:
    """Tensor parallelism stays within a node. The target is held whole, shared within a node or
    shared by all; its experts are split as the rest, or whole ones are spread over the
    tensor-parallel ranks or over all that share the target."""

    def choices(key: str, values: list[Any]) -> list[Any]:
        section, name = key.split(".")
        return [getattr(getattr(base, section), name)] if key in fixed else values

    gpus, world = machine.gpus_per_node, machine.world_size
    for tp in choices(SEARCHED[0], [n for n in range(1, gpus + 1) if gpus % n == 0]):
        sharing = sorted({1, max(1, gpus // tp), max(1, world // tp)})
        for shards in choices(SEARCHED[1], sharing):
            spread = sorted({1, tp, tp * (shards or max(1, world // tp))})
            again = choices(SEARCHED[3], [False, True])
            rows = choices(SEARCHED[4], [False, True] if tp > 1 else [False])
            for ep, recompute, split in product(choices(SEARCHED[2], spread), again, rows):
                yield replace(
                    base,
                    target=replace(base.target, shard_across_data_parallel=shards),
                    parallel=replace(
                        base.parallel,
                        tensor_parallel=tp,
                        expert_parallel=ep,
                        sequence_parallel=split,
                    ),
                    train=replace(base.train, recompute_activations=recompute),
                )


def _candidate(plan: RunPlan, machine: Machine) -> Candidate:
    memory, sent = rank_memory(plan), {True: 0, False: 0}
    for one in step_work(plan).sent:
        sent[one.span <= machine.gpus_per_node] += one.sent
    seconds = sent[True] / machine.node_gb_per_s + sent[False] / machine.network_gb_per_s
    seconds /= 1e9
    split = plan.config.parallel
    order = (
        seconds,
        plan.config.train.recompute_activations,
        split.tensor_parallel,
        plan.target_split.shards,
        split.expert_parallel,
    )
    fits = memory.total <= machine.usable_bytes
    return Candidate(plan, memory, sent[True], sent[False], fits, seconds, order)
