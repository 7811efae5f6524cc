"""The draft's weights, looked at before they are saved."""

import math

import torch
import torch.distributed as dist

from dspark_megatron.errors import ConfigError
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.training.health.bad_samples import largest

LARGEST = 1e4
"""AdamW moves a weight by about its learning rate in a step, and drafts start with weights below
1 and norms below a few hundred, so at a rate of 1e-3 it would take ten million steps to get there.
"""


@torch.no_grad()
def check_weights(draft: DSparkDraftModel, iteration: int) -> None:
    """ConfigError on all ranks if a trained weight of any rank is not finite, or absurdly large:
    such a checkpoint must not take the place of a good one. One all-reduce of one number over the
    world."""
    own = {name: largest(p) for name, p in draft.named_parameters() if p.requires_grad}
    sizes = torch.stack([*own.values()])
    worst = sizes.max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if worst.item() <= LARGEST:
        return
    bad = {
        name: "not finite" if math.isinf(size) else f"as large as {size:.3g}"
        for name, size in zip(own, sizes.tolist(), strict=True)
        if size > LARGEST
    }
    of_ranks = [bad] * dist.get_world_size()
    dist.all_gather_object(of_ranks, bad)
    found = {name: text for part in of_ranks for name, text in part.items()}
    named = ", ".join(f"{name} is {text}" for name, text in [*found.items()][:3])
    raise ConfigError(
        f"the draft's weights must be finite and at most {LARGEST:g} to be saved, and at iteration "
        f"{iteration:,} {len(found)} tensors are not: {named}. Nothing was saved and the older "
        "checkpoints are as they were. Lower optimizer.lr, clip by optimizer.clip_grad or set "
        "train.skip_gradient_norm_above, and start again, if need be from an older checkpoint with "
        "train.resume_from"
    )
