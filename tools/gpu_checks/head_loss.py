"""The head loss: values and gradients, then time and memory at the sizes of real targets."""

import functools
from argparse import Namespace
from collections.abc import Callable
from unittest import mock

import benchmarking
import torch
import torch.distributed as dist
from loss_variants import Problem, Products
from torch import Tensor

from dspark_megatron.config.objective.terms import TERMS
from dspark_megatron.ops import chunk_budget
from dspark_megatron.ops.head_loss import HeadLoss, HeadWeights
from dspark_megatron.ops.objective.objective import Objective
from dspark_megatron.ops.vocab_parallel import VocabShard
from gpu_checks.context import Context, check_close
from support.reference import plain_head_loss

OBJECTIVES = {
    "ce + l1": Objective(ce=0.1, l1=0.9),
    "ce + l1 + kl": Objective(ce=0.1, l1=0.5, kl=0.4),
    "all terms": Objective(**dict.fromkeys(TERMS, 0.2)),
    "target's labels": Objective(ce=0.5, l1=0.5, labels_from_target=True),
}
# Sums of thousands of terms in another order; in bf16 logits are rounded to 2^-8 of themselves, and
# p - q may change its sign where the two are nearly equal.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
TARGETS = {"8B": (4096, 151936), "70B": (8192, 128256)}
ROWS, RANK = 3584, 256


def check(context: Context) -> None:
    group = context.runtime().tp_group
    targets = {"tiny": (64, 1000)} if context.tiny else TARGETS
    for name, (hidden, vocab) in targets.items():
        context.figures[f"speed, {name}"] = _speed(context, hidden, vocab, group)
    for dtype in TOLERANCE:
        for name, objective in OBJECTIVES.items():
            if objective.labels_from_target and dtype == torch.bfloat16:
                continue  # rounded logits name another most likely token than those in fp32
            # Code for a CPU takes minutes to compile, and tests do it.
            for compiled in (False,) if context.tiny else (False, True):
                label = f"{name}, {str(dtype)[6:]}{', compiled' if compiled else ''}"
                _check_values(context, label, dtype, objective, compiled, group)


def _check_values(
    context: Context,
    label: str,
    dtype: torch.dtype,
    objective: Objective,
    compiled: bool,
    group: dist.ProcessGroup,
) -> None:
    """Against the plain loss in fp32 on the same numbers."""
    torch._dynamo.reset()  # its limit of compilations is one of a process
    n, h, r, v = 300, 128, 32, 2003
    generator = torch.Generator(context.device).manual_seed(7)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*size, generator=generator, device=context.device) * scale
        return made.to(dtype)

    leaves = [normal(n, h), normal(n, r), normal(v, r, scale=r**-0.5)]
    target_hidden, lm_head = normal(n, h), normal(v, h, scale=3 * h**-0.5)
    labels = torch.randint(0, v, (n,), generator=generator, device=context.device)
    weights = torch.rand(n, generator=generator, device=context.device)
    hidden, latent, w2 = (leaf.clone().requires_grad_() for leaf in leaves)
    head = HeadWeights(
        torch.cat([lm_head, w2.detach()], dim=1), w2, VocabShard.of_group(v, v, group)
    )
    head_loss = HeadLoss(head, objective, 128, compiled, tp_group=group)
    ours = head_loss(hidden, latent, target_hidden, labels, weights)
    found = torch.autograd.grad(ours.loss, (hidden, latent, w2))
    plain_leaves = [leaf.float().requires_grad_() for leaf in leaves]
    loss, terms = plain_head_loss(
        *plain_leaves[:2],
        target_hidden.float(),
        labels,
        weights,
        lm_head.float(),
        plain_leaves[2],
        terms={name: getattr(objective, name) for name in TERMS},
        labels_from_target=objective.labels_from_target,
    )
    expected = torch.autograd.grad(loss, plain_leaves)
    tolerance = TOLERANCE[dtype]
    check_close(context, f"loss ({label})", ours.loss.detach(), loss.detach(), tolerance)
    for name, got in ours.terms.items():
        check_close(context, f"{name} ({label})", got, terms[name].detach(), tolerance)
    for name, got, want in zip(("hidden", "latent", "w2"), found, expected, strict=True):
        check_close(context, f"gradient of {name} ({label})", got, want, tolerance)


def _speed(
    context: Context, hidden: int, vocab: int, group: dist.ProcessGroup
) -> list[dict[str, float | str]]:
    """Rows of a table: ours by chunk size, compiled, without tiles; plain; bare products."""
    torch._dynamo.reset()
    rows, rank = (64, 16) if context.tiny else (ROWS, RANK)
    sizes = dict(rows=rows, rank=rank, hidden=hidden, vocab=vocab, chunk_rows=rows // 7)
    options = dict(dtype="bfloat16", seed=1, memory_budget_mb=1, compile=False, softcap=30.0)
    problem = Problem(Namespace(**sizes, **options), group, context.device)
    chunks = [rows // parts for parts in (14, 7, 3, 1)]
    calls: dict[str, Callable] = {
        f"chunks of {chunk}": functools.partial(_ours, problem, chunk, False) for chunk in chunks
    }
    calls[f"chunks of {chunks[1]}, no tiles"] = functools.partial(
        _without_tiles, problem, chunks[1]
    )
    if not context.tiny:
        calls[f"chunks of {chunks[1]}, compiled"] = functools.partial(
            _ours, problem, chunks[1], True
        )
    calls |= {"plain": problem.plain}
    products = {f"products of {chunk} rows": Products(problem, chunk) for chunk in chunks[1::2]}
    rounds = 1 if context.tiny else 5
    peaks = {
        name: benchmarking.peak_memory(call, context.device, repeats=1)
        for name, call in calls.items()
    }
    seconds = benchmarking.interleaved_seconds(calls | products, context.device, rounds=rounds)
    bare = min(seconds[name] for name in products)
    return [
        {
            "variant": name,
            "ms": 1e3 * time,
            "time / products": time / bare,
            "time / plain": time / seconds["plain"],
            "MiB": peaks.get(name, 0) / benchmarking.MIB,
        }
        for name, time in seconds.items()
    ]


def _ours(problem: Problem, chunk_rows: int, compiled: bool) -> None:
    problem.chunk_rows, problem.compile = chunk_rows, compiled
    problem.head_loss()


def _without_tiles(problem: Problem, chunk_rows: int) -> None:
    with mock.patch.object(chunk_budget, "tile_rows", lambda *_: chunk_rows):
        _ours(problem, chunk_rows, False)
