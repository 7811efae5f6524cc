"""Process groups of a frozen Megatron-Core target, made beside those of the draft.

`parallel_state` stays as the draft has it, one stage and no experts, so that its data-parallel
group remains all ranks of the same tensor-parallel place. Ranks are in Megatron-Core's order:
tensor parallel innermost, pipeline stages outermost.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from dspark_megatron.errors import ConfigError, require


def target_groups(
    *, tp_group: dist.ProcessGroup, pp_size: int = 1, ep_size: int = 1
) -> ProcessGroupCollection:
    """What a GPTModel and its experts are built with. Collective over the world. tp_group: the
    run's. Whole experts are spread over ep_size neighbouring ranks of a stage; 1 leaves them split
    over the tensor-parallel ranks."""
    ranks = StageRanks.of(dist.get_rank(), dist.get_world_size(), tp_group.size(), pp_size)
    known: list[Any] = [tp_group, dist.group.WORLD]

    def group(members: list[int]) -> dist.ProcessGroup:
        """One for each set of ranks; only its members take part in making it."""
        for one in known:
            if dist.get_process_group_ranks(one) == members:
                return one
        known.append(dist.new_group(members, use_local_synchronization=True))
        return known[-1]

    alone, stage = group([ranks.rank]), group(ranks.stage)
    dp = group(ranks.data_parallel)
    ep = group(ranks.expert_parallel(ep_size)) if ep_size > 1 else alone
    return ProcessGroupCollection(
        tp=tp_group,
        pp=group(ranks.pipeline),
        cp=alone,
        tp_cp=tp_group,
        dp=dp,
        dp_cp=dp,
        tp_dp_cp=stage,
        ep=ep,
        expt_tp=alone if ep_size > 1 else tp_group,
        tp_ep=ep if ep_size > 1 else tp_group,
        expt_dp=group(ranks.expert_data_parallel(ep_size)) if ep_size > 1 else dp,
        embd=None,  # for the gradients of tied weights: a frozen model has none
        pos_embd=None,
    )


@dataclass(frozen=True)
class StageRanks:
    """Which ranks of the world a rank shares what with."""

    rank: int
    tp_size: int
    stage: list[int]
    """Ranks of the same pipeline stage, ascending."""
    pipeline: list[int]
    """Ranks of the same place in every stage."""

    @classmethod
    def of(cls, rank: int, world_size: int, tp_size: int, pp_size: int) -> "StageRanks":
        size = world_size // pp_size
        start = rank // size * size
        stage = list(range(start, start + size))
        return cls(rank, tp_size, stage, list(range(rank % size, world_size, size)))

    @property
    def data_parallel(self) -> list[int]:
        return self.stage[self._place % self.tp_size :: self.tp_size]

    def expert_parallel(self, ep_size: int) -> list[int]:
        first = self._place // ep_size * ep_size
        return self.stage[first : first + ep_size]

    def expert_data_parallel(self, ep_size: int) -> list[int]:
        return self.stage[self._place % ep_size :: ep_size]

    @property
    def _place(self) -> int:
        return self.rank - self.stage[0]


def check_expert_parallel(
    ep_size: int, num_experts: int | None, stage_size: int, *, tp_size: int
) -> None:
    """ConfigError unless the experts can be spread over ep_size ranks of a stage, such that all
    tensor-parallel ranks of a place meet the same ranks in them."""
    if ep_size == 1:
        return
    if num_experts is None:
        raise ConfigError(
            f"parallel.expert_parallel ({ep_size}) needs a mixture-of-experts target, and this one "
            "is dense; set parallel.expert_parallel=1"
        )
    good = [
        n
        for n in range(1, stage_size + 1)
        if not stage_size % n and not num_experts % n and not (n % tp_size and tp_size % n)
    ]
    require(
        ep_size in good,
        f"parallel.expert_parallel ({ep_size}) must divide the ranks of one pipeline stage "
        f"({stage_size}) and the number of experts ({num_experts}), and be a multiple or a divisor "
        f"of parallel.tensor_parallel ({tp_size}); sizes that work here: {good}",
    )
