"""How the target's weights are split over ranks, and what its family lets be split."""

import copy
import fnmatch
import functools
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from dspark_megatron.config import Config
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.shape.layout import target_shards
from dspark_megatron.targets.family import model_class


@dataclass(frozen=True)
class TargetSplit:
    """Sizes of the groups that share the target's weights; data-parallel ranks of one group are
    neighbours. Attention and dense layers: tp_size x shards. Experts: ep_size, and what is left of
    those ranks shares each expert group's weights again."""

    tp_size: int = 1
    dp_size: int = 1
    shards: int = 1
    ep_size: int = 1

    @classmethod
    def of(cls, config: Config, dp_size: int) -> "TargetSplit":
        parallel, shards = config.parallel, target_shards(config.target, dp_size)
        return cls(parallel.tensor_parallel, dp_size, shards, parallel.expert_parallel)

    @property
    def lockstep(self) -> bool:
        """Whether data-parallel ranks need each other in a forward pass: weights travel between
        them, and with ep_size > tp_size tokens do, too."""
        return self.shards > 1

    @property
    def copies(self) -> int:
        """How often the whole target is there, whether on one rank or on several."""
        return self.dp_size // self.shards

    @property
    def expert_shards(self) -> int:
        """Ranks that share the weights of the same experts."""
        return self.tp_size * self.shards // self.ep_size

    def distributed_config(self) -> DistributedConfig | None:
        """Transformers' form of it; None where every rank holds the whole target."""
        if self.tp_size == self.shards == 1:
            return None
        sizes = {
            "tp_size": self.tp_size,
            "fsdp_size": self.shards,
            "dp_replicate_size": self.copies,
            "ep_size": self.ep_size,
        }
        # Sizes of 1 are left out: an older Transformers does not know all of them.
        return DistributedConfig(**{name: size for name, size in sizes.items() if size > 1})


def meta_target(target_config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base model on the meta device: it takes no memory, but a second to build where it has
    many layers. To be looked at only: the same one is given to all."""
    return _built(_Described(target_config.to_json_string(), target_config), dtype)


@dataclass(frozen=True)
class _Described:
    """A config that is the same as another with the same text."""

    text: str
    config: PretrainedConfig = field(compare=False)


@functools.lru_cache(maxsize=2)
def _built(described: _Described, dtype: torch.dtype) -> PreTrainedModel:
    own = copy.deepcopy(described.config)  # a model leaves its type in it
    model_class(own)
    try:
        with torch.device("meta"):
            return AutoModel.from_config(own, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # whatever a family's class makes of its own config
        raise ConfigError(
            f"Transformers cannot build a target of model_type {own.model_type!r} from its config: "
            f"{' '.join(str(error).split())}"
        ) from error


def check_target_split(target_config: PretrainedConfig, split: TargetSplit) -> None:
    """ConfigError unless Transformers can split this family's weights so."""
    _check_version(split)
    if split.tp_size == split.ep_size == 1:
        return
    model = meta_target(target_config, torch.bfloat16)
    family = target_config.model_type
    require(
        split.tp_size == 1 or bool(model.tp_plan),
        f"Transformers has no tensor-parallel plan for the target's family ({family}); set "
        "parallel.tensor_parallel=1 and split it with target.shard_across_data_parallel"
        + (" and parallel.expert_parallel" if _version() >= _EXPERTS and model.ep_plan else ""),
    )
    if split.ep_size > 1:
        _check_experts(model, split)
    else:
        _check_packed(model, split.tp_size)


_COPIES, _EXPERTS = (5, 23), (5, 20)
"""The Transformers that can load several copies of a split target; and one that can spread experts,
or split by tensor parallelism and shards at once. What is left works since 5.17."""


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _check_version(split: TargetSplit) -> None:
    one_copy = split.tp_size * split.shards
    require(
        one_copy == 1 or split.copies == 1 or _version() >= _COPIES,
        f"Transformers {transformers.__version__} cannot load several copies of a split target, "
        f"here {split.copies} of {one_copy} ranks each (parallel.tensor_parallel {split.tp_size} x "
        f"target.shard_across_data_parallel {split.shards}); install transformers>=5.23 (it needs "
        f"Python 3.11), or split one copy over all {one_copy * split.copies} ranks",
    )
    require(
        split.ep_size == 1 and 1 in (split.tp_size, split.shards) or _version() >= _EXPERTS,
        f"Transformers {transformers.__version__} can split a target in one way only, and here are "
        f"parallel.tensor_parallel {split.tp_size}, target.shard_across_data_parallel "
        f"{split.shards} and parallel.expert_parallel {split.ep_size}; install transformers>=5.20, "
        "or leave one of the first two above 1 and the rest at 1",
    )


def _check_experts(model: PreTrainedModel, split: TargetSplit) -> None:
    experts = {
        len(parameter)
        for name, parameter in model.named_parameters()
        if style_of(name, model.ep_plan) == "grouped_gemm"
    }
    family, ep = model.config.model_type, split.ep_size
    require(
        bool(experts),
        f"parallel.expert_parallel ({ep}) needs a mixture-of-experts target that Transformers has "
        f"an expert-parallel plan for, and this one ({family}) is not; set "
        "parallel.expert_parallel=1",
    )
    tp, ranks = split.tp_size, split.tp_size * split.shards
    counts = " and ".join(map(str, sorted(experts)))
    good = [
        n
        for n in range(1, ranks + 1)
        if (n == 1 or n % tp == 0) and ranks % n == 0 and not any(count % n for count in experts)
    ]
    require(
        ep in good,
        f"parallel.expert_parallel ({ep}) must be a multiple of parallel.tensor_parallel ({tp}) "
        f"that divides the number of experts ({counts}) and the ranks that share one copy of the "
        f"target ({ranks} = parallel.tensor_parallel {tp} x target.shard_across_data_parallel "
        f"{split.shards}); sizes that work here: {good}",
    )


def _check_packed(model: PreTrainedModel, tp: int) -> None:
    """Two matrices in one (gate and up) split only evenly."""
    for name, parameter in model.named_parameters():
        style = style_of(name, model.tp_plan)
        if style.startswith("packed") and parameter.dim() > 1:
            size = parameter.shape[split_dimension(style, parameter)] // 2
            good = [n for n in range(1, tp + 1) if size % n == 0]
            require(
                size % tp == 0,
                f"the width of the target's experts ({size}, {name}) must be divisible by "
                f"parallel.tensor_parallel ({tp}), or experts stay whole with "
                f"parallel.expert_parallel; tensor-parallel sizes that work here: {good}",
            )


def style_of(name: str, plan: dict[str, str] | None) -> str:
    """How a plan splits a parameter, by its own name or its module's; "" if it does not."""
    for candidate in (name, name.rpartition(".")[0]):
        for pattern, style in (plan or {}).items():
            if fnmatch.fnmatchcase(candidate, pattern):
                return style
    return ""


def split_dimension(style: str, parameter: nn.Parameter) -> int | None:
    """Which dimension a tensor-parallel style splits; None for none. Experts are stacked on one
    more, in front."""
    if style.startswith("embedding_rowwise"):
        return 0
    if "rowwise" in style:
        return parameter.dim() - 1 if parameter.dim() > 1 else None
    if "colwise" in style:
        return max(parameter.dim() - 2, 0)
    return None
