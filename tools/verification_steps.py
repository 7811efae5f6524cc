"""The work of measure_sps.py: verification steps of a target, timed."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import benchmarking
import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import require
from dspark_megatron.evaluation.serving.sps_table import SpsTable, measured_table, write_sps_table
from dspark_megatron.run.build import build_target, read_target_head
from dspark_megatron.run.check import RunPlan, check
from dspark_megatron.run.known_draft import with_some_draft
from dspark_megatron.run.ranks.agreement import agree, agree_at_launch
from dspark_megatron.run.ranks.facts import launch_facts, target_facts
from dspark_megatron.run.ranks.places import set_time_limit
from dspark_megatron.run.ranks.runtime import Launch, Runtime, start
from dspark_megatron.storage.writing import claim_file

Sizes = tuple[int, int]
"""Requests of a step, and new tokens of each of them."""


def run(job: Launch, args: Namespace) -> None:
    config = load_config(args.config, args.overrides, trains=False)
    set_time_limit(config.train.timeout_minutes)
    own = {k: v for k, v in vars(args).items() if k not in ("config", "overrides")}
    agree_at_launch(job, launch_facts(config, command="measure_sps", **own))
    config = with_some_draft(config)
    require(
        config.target.provider == "huggingface",
        "steps are measured with a key/value cache, which target.provider "
        f"{config.target.provider!r} has not; set target.provider=huggingface",
    )
    tp = config.parallel.tensor_parallel
    require(
        job.world_size == tp,
        f"one copy of the target is measured, and {job.world_size} processes were started; launch "
        f"parallel.tensor_parallel ({tp})",
    )
    config.evaluate.batch_size = max([1, *args.requests])
    plan = check(config, job.world_size, use="evaluate")
    check_arguments(args, plan)
    runtime = start(job, tp)
    agree(target_facts(plan))
    table = measure(plan, runtime, args)
    if runtime.is_main:
        print(show(table, args.batch_tokens))
        write_sps_table(args.output, table)
        print(f"wrote {args.output}", flush=True)


class Verifier:
    """A target that takes verification steps behind made-up contexts."""

    def __init__(self, plan: RunPlan, runtime: Runtime, context_length: int) -> None:
        self.target, self.device = build_target(plan, runtime), runtime.device
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
        hidden = self.target.extend(input_ids, cache).last_hidden  # [b, q, h]
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
    seconds = benchmarking.interleaved_seconds(
        calls,
        verifier.device,
        rounds=rounds,
        warm_up=2,
        barrier=partial(dist.barrier, tp_group),
    )
    slowest = torch.tensor([seconds[size] for size in sizes], device=verifier.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=tp_group)
    return dict(zip(sizes, slowest.tolist(), strict=True))


def measure(plan: RunPlan, runtime: Runtime, args: Namespace) -> SpsTable:
    """The table; all ranks call it together."""
    tokens, requests = sorted(set(args.batch_tokens)), sorted(set(args.requests))
    sizes = [(1, n) for n in tokens] + [(n, 1) for n in requests if n > 1]
    verifier = Verifier(plan, runtime, args.context_length)
    seconds = step_seconds(verifier, sizes, args.rounds, runtime.tp_group)
    by_tokens = {n: seconds[1, n] for n in tokens}
    return measured_table(by_tokens, {n: seconds[n, 1] for n in requests if n > 1})


def check_arguments(args: Namespace, plan: RunPlan) -> None:
    tokens, context = args.batch_tokens, args.context_length
    require(
        len(set(tokens)) > 1 and min(tokens) == 1,
        f"--batch-tokens must hold 1 and larger numbers, is {tokens}",
    )
    require(
        all(1 <= n <= max(tokens) for n in args.requests),
        f"--requests must lie in the range of --batch-tokens, 1 to {max(tokens)}, is "
        f"{args.requests}",
    )
    require(args.rounds >= 1, f"--rounds ({args.rounds}) must be >= 1")
    longest = plan.shape.max_position_embeddings
    require(
        context >= 1 and context + max(tokens) <= longest,
        f"--context-length ({context}) must be >= 1, and with {max(tokens)} tokens more at most "
        f"the target's {longest} positions",
    )
    claim_file(args.output, "--output")


def show(table: SpsTable, batch_tokens: list[int]) -> str:
    """Time of each number of tokens, of one request; and where it cannot be right."""
    tokens = torch.tensor(sorted(set(batch_tokens)))
    rates = table.steps_per_second(tokens, 1).tolist()
    rows = [
        {"tokens": n, "ms": 1e3 / rate, "steps / s": rate, "tokens / s": n * rate}
        for n, rate in zip(tokens.tolist(), rates, strict=True)
    ]
    formats = {"tokens": "d", "ms": ",.2f", "steps / s": ",.2f", "tokens / s": ",.1f"}
    lines = [benchmarking.table(rows, formats)]
    for few, many in pairwise(rows):
        if few["ms"] > 1.1 * many["ms"]:
            lines.append(
                f"warning: {few['tokens']} tokens took longer than {many['tokens']}; take more "
                "--rounds, on a machine that does nothing else"
            )
    return "\n".join(lines)
