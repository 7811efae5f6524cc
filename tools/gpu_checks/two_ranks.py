"""Two tensor-parallel ranks on one GPU over gloo: NCCL takes one rank for each GPU."""

from typing import Any

import torch

from dspark_megatron.run.ranks.runtime import Runtime
from gpu_checks.context import Context, Skip, check_close
from support.ranks import RankPool
from support.shapes import SHAPE
from support.tiny_draft import (
    assemble,
    build_tiny_draft,
    layout_of,
    make_samples,
    make_step,
    one_collective_at_a_time,
    rank_micro_batches,
)

ERRORS = "RuntimeError", "NotImplementedError"
NO_COLLECTIVE = "ProcessGroupGloo", "No backend type"
"""What PyTorch's errors say of collectives that gloo has not for CUDA tensors."""


def check(context: Context) -> None:
    pool = RankPool(2)
    try:
        [whole] = pool.run(step, world=1, tp=1, sequence_parallel=False)
        for split in (False, True):
            halves = pool.run(step, world=2, tp=2, sequence_parallel=split)
            _compare(context, whole, halves, "sequence parallel" if split else "tensor parallel")
    except AssertionError as error:
        said = [line for line in str(error).splitlines() if line.startswith(ERRORS)]
        if said and all(any(word in line for word in NO_COLLECTIVE) for line in said):
            raise Skip(f"gloo cannot do this with CUDA tensors: {said[0]}") from error
        raise
    finally:
        pool.close()


def step(runtime: Runtime, sequence_parallel: bool) -> dict[str, Any]:
    """Loss and gradients of one step on this rank, on the host."""
    from dspark_megatron.training.metrics import MetricSums

    model = build_tiny_draft(runtime, SHAPE, sequence_parallel=sequence_parallel)
    samples = make_samples(SHAPE)
    metrics = MetricSums.zeros(SHAPE.num_draft_tokens, runtime.device)
    gradients = make_step(runtime, model, samples)
    with one_collective_at_a_time():
        gradients.run(rank_micro_batches(runtime, samples, SHAPE.num_draft_tokens, 2), metrics)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        "device": str(runtime.device),
        "loss": metrics.means(gradients.forward_step.term_weights)["loss"],
        "gradients": {name: p.main_grad.cpu() for name, p in trained.items()},
        "layout": layout_of(model),
    }


def _compare(context: Context, whole: dict, halves: list[dict], label: str) -> None:
    context.figures[f"devices ({label})"] = [half["device"] for half in halves]
    found = assemble([half["gradients"] for half in halves], halves[0]["layout"])
    expected = whole["gradients"]
    # The vocabulary is padded for two ranks; the rows of padding get no gradient.
    for name, got in found.items():
        own = got[tuple(slice(size) for size in expected[name].shape)]
        check_close(context, f"{name} ({label})", own, expected[name], 1e-4)
    losses = torch.tensor([half["loss"] for half in halves])
    check_close(context, f"loss ({label})", losses, torch.full((2,), whole["loss"]), 1e-5)
