"""Verification steps of a target, timed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.evaluation.serving.settings import StepSettings
from dspark_megatron.evaluation.serving.sps_table import SpsTable, measured_table
from dspark_megatron.evaluation.serving.timing import interleaved_seconds
from dspark_megatron.run.build import build_target, read_target_head
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget

Sizes = tuple[int, int]
"""Requests of a step, and new tokens of each of them."""


def measured_steps(plan: RunPlan, runtime: Runtime, settings: StepSettings) -> SpsTable:
    """The table; all ranks call it together."""
    tokens, requests = sorted(set(settings.batch_tokens)), sorted(set(settings.requests))
    sizes = [(1, n) for n in tokens] + [(n, 1) for n in requests if n > 1]
    verifier = Verifier(plan, runtime, settings.context_length)
    seconds = step_seconds(verifier, sizes, settings.rounds, runtime.tp_group)
    by_tokens = {n: seconds[1, n] for n in tokens}
    return measured_table(by_tokens, {n: seconds[n, 1] for n in requests if n > 1})


class Verifier:
    """A target that takes verification steps behind made-up contexts."""

    def __init__(self, plan: RunPlan, runtime: Runtime, context_length: int) -> None:
        target = build_target(plan, runtime)
        assert isinstance(target, HuggingFaceTarget), "has a key/value cache"
        self.target, self.device = target, runtime.device
        self.head, _ = read_target_head(plan, self.target, tp_group=runtime.tp_group)
        self.vocab_size, self.context_length = plan.shape.vocab_size, context_length
        self.generator = torch.Generator().manual_seed(0)  # the same tokens on every rank

    def contexts(self, requests: int) -> Any:
        """A cache of so many sequences."""
        cache = self.target.new_cache()
        for _ in range(requests):
            self.target.add_sequence(self.token_ids(1, self.context_length), cache)
        return cache

    def verify(self, cache: Any, input_ids: Tensor) -> Tensor:
        """Take new tokens [b, q] of every sequence, and forget them. -> logits [b, q, v/tp]."""
        hidden = self.target.extend(input_ids, cache).hidden  # [b, q, h]
        logits = self.head.logits(hidden)
        self.target.forget(cache, [input_ids.shape[1]] * len(input_ids))
        return logits

    def token_ids(self, *size: int) -> Tensor:
        return torch.randint(self.vocab_size, size, generator=self.generator).to(self.device)


def step_seconds(
    verifier: Verifier, sizes: list[Sizes], rounds: int, tp_group: dist.ProcessGroup
) -> dict[Sizes, float]:
    """Median seconds of steps of these sizes, of the slowest rank. A barrier before each step, and
    one all-reduce of the medians."""
    caches = {requests: verifier.contexts(requests) for requests, _ in sizes}
    calls: dict[Sizes, Callable] = {
        size: partial(verifier.verify, caches[size[0]], verifier.token_ids(*size)) for size in sizes
    }
    seconds = interleaved_seconds(
        calls,
        verifier.device,
        rounds=rounds,
        warm_up=2,
        barrier=partial(dist.barrier, tp_group),
    )
    slowest = torch.tensor([seconds[size] for size in sizes], device=verifier.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=tp_group)
    return dict(zip(sizes, slowest.tolist(), strict=True))
