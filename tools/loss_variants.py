"""The ways to compute the head loss that `benchmark_loss.py` compares, on equal inputs.

Shapes: n rows, h hidden, r Markov rank, v/t columns of a rank.
"""

import argparse

import benchmarking  # makes `reference` importable
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dspark_megatron.config import LossConfig
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.ops.head_loss import HeadLoss, HeadWeights
from dspark_megatron.ops.logit_transform import IDENTITY, LogitTransform
from dspark_megatron.ops.objective.objective import Objective
from dspark_megatron.ops.vocab_parallel import VocabShard
from support.reference import plain_head_loss

CE, L1 = 0.1, 0.9
DEFAULT = Objective(ce=CE, l1=L1)


class Problem:
    """Inputs of the loss for one tensor-parallel size: the same numbers at each, cut to ranks."""

    def __init__(self, args: argparse.Namespace, group: dist.ProcessGroup, device) -> None:
        generator = torch.Generator(device).manual_seed(args.seed)
        dtype = benchmarking.DTYPES[args.dtype]

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(rows, columns, generator=generator, device=device)
            return made.mul_(scale).to(dtype)

        self.group, self.device = group, device
        self.hidden = normal(args.rows, args.hidden).requires_grad_()
        self.latent = normal(args.rows, args.rank).requires_grad_()
        self.target_hidden = normal(args.rows, args.hidden)
        place = dict(generator=generator, device=device)
        self.labels = torch.randint(0, args.vocab, (args.rows,), **place)
        self.weights = 0.5 + torch.rand(args.rows, **place)
        self.shard = VocabShard.of_group(args.vocab, args.vocab, group)
        columns = slice(self.shard.vocab_start_index, self.shard.vocab_end_index)
        # Logits of a spread of about 3, as a trained model has.
        self.lm_head = normal(args.vocab, args.hidden, 3 * args.hidden**-0.5)[columns].clone()
        self.w2 = normal(args.vocab, args.rank, args.rank**-0.5)[columns].clone().requires_grad_()
        self.output_weight = torch.cat([self.lm_head, self.w2.detach()], dim=1)
        loss = LossConfig(memory_budget_mb=args.memory_budget_mb, chunk_rows=args.chunk_rows)
        local = args.vocab // group.size(), dtype
        self.chunk_rows = chunk_rows(loss, *local, with_target=True)
        self.capped_rows = chunk_rows(loss, *local, with_target=True, capped=True)
        self.compile, self.softcapping = args.compile, args.softcap

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.latent, self.w2))

    def plain(self, softcapping: float | None = None) -> tuple[Tensor, ...]:
        rows = slice(None), self.hidden, self.latent, self.w2
        return self.gradients(self._plain_rows(*rows, softcapping))

    def recompute(self) -> tuple[Tensor, ...]:
        loss = self.hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, len(self.labels), self.chunk_rows):
            part = slice(first, first + self.chunk_rows)
            inputs = part, self.hidden[part], self.latent[part], self.w2
            options = dict(use_reentrant=False, preserve_rng_state=False)
            loss = loss + checkpoint(self._plain_rows, *inputs, **options)
        return self.gradients(loss)

    def _plain_rows(
        self,
        part: slice,
        hidden: Tensor,
        latent: Tensor,
        w2: Tensor,
        softcapping: float | None = None,
    ) -> Tensor:
        rows = hidden, latent, self.target_hidden[part], self.labels[part], self.weights[part]
        capped = dict.fromkeys(("draft_transform", "target_transform"), (1.0, softcapping))
        return plain_head_loss(*rows, self.lm_head, w2, terms={"ce": CE, "l1": L1}, **capped)[0]

    def capped(self) -> tuple[Tensor, ...]:
        """The head loss with a soft cap of both sides, in chunks of the same budget."""
        return self.head_loss(LogitTransform(1.0, self.softcapping), self.capped_rows)

    def head_loss(
        self,
        transform: LogitTransform = IDENTITY,
        rows_of_chunk: int | None = None,
        objective: Objective = DEFAULT,
    ) -> tuple[Tensor, ...]:
        head = HeadWeights(self.output_weight, self.w2, self.shard, transform)
        how = rows_of_chunk or self.chunk_rows, self.compile, transform
        head_loss = HeadLoss(head, objective, *how, tp_group=self.group)
        rows = self.hidden, self.latent, self.target_hidden, self.labels, self.weights
        return self.gradients(head_loss(*rows).loss)


class Products:
    """The matrix products of a chunk size, into a workspace that is there already."""

    def __init__(self, problem: Problem, rows: int) -> None:
        self.features = torch.cat([problem.hidden, problem.latent], dim=1).detach()
        self.target_hidden, self.latent = problem.target_hidden, problem.latent.detach()
        self.output_weight, self.lm_head = problem.output_weight, problem.lm_head
        self.rows = min(rows, len(self.features))
        self.draft = self.output_weight.new_empty(self.rows, len(self.output_weight))
        self.target = torch.empty_like(self.draft)
        self.grad_features = torch.empty_like(self.features)
        self.grad_w2 = torch.zeros_like(problem.w2)

    @torch.no_grad()
    def __call__(self) -> None:
        self.grad_w2.zero_()
        for first in range(0, len(self.features), self.rows):
            part = slice(first, first + self.rows)
            features, latent = self.features[part], self.latent[part]
            draft, target = self.draft[: len(features)], self.target[: len(features)]
            torch.mm(features, self.output_weight.t(), out=draft)
            torch.mm(self.target_hidden[part], self.lm_head.t(), out=target)
            torch.mm(draft, self.output_weight, out=self.grad_features[part])
            self.grad_w2.addmm_(draft.t(), latent)
