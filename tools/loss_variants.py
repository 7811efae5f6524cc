"""The ways to compute the head loss that `benchmark_loss.py` compares, on equal inputs.

Shapes: n rows, h hidden, r Markov rank, v/t columns of a rank.
"""

import argparse
from typing import Literal, NamedTuple

import benchmarking  # makes `reference` importable
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dspark_megatron.config import LossConfig
from dspark_megatron.config.objective.terms import TERMS, LossWeighting
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.ops.head_loss import HeadLoss, HeadWeights
from dspark_megatron.ops.logit_transform import IDENTITY, LogitTransform
from dspark_megatron.ops.objective.acceptance_weights import AcceptanceWeights, BlockSlots
from dspark_megatron.ops.objective.objective import Objective
from dspark_megatron.ops.vocab_parallel import VocabShard
from support.reference import plain_acceptance_weights, plain_head_loss

CE, L1 = 0.1, 0.9
BLOCK_SIZE = 7
ALPHA = LossWeighting.alpha


class Case(NamedTuple):
    """What a slot loses, and what slots weigh: fixed weights, or those by acceptance."""

    objective: Objective
    weighting: Literal["decay", "dpace", "dpard"] = "decay"


DEFAULT = Case(Objective(ce=CE, l1=L1))
OBJECTIVES = {
    "default": DEFAULT,
    **{name: Case(Objective(**{"ce": CE, name: L1})) for name in TERMS[2:]},
    "dpace": Case(Objective(ce=1.0), "dpace"),
    "dpard": Case(Objective(renyi_half=1.0), "dpard"),
}
"""The default, each other term in the place of its L1, and the presets that weigh by acceptance."""


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

    def plain(self, softcapping: float | None = None, case: Case = DEFAULT) -> tuple[Tensor, ...]:
        weights = self.weights if case.weighting == "decay" else self._plain_weights(case)
        rows = slice(None), self.hidden, self.latent, self.w2
        return self.gradients(self._plain_rows(*rows, weights, softcapping, case)[0])

    @torch.no_grad()
    def _plain_weights(self, case: Case) -> Tensor:
        """By acceptance, of blocks whose slots are all supervised but for the last one's."""
        rows = slice(None), self.hidden, self.latent, self.w2
        _, terms = self._plain_rows(*rows, self.weights, None, case)
        likely = (-terms["ce"]).exp() if case.weighting == "dpace" else 1 - terms["l1"] / 2
        slots = torch.arange(-(-len(likely) // BLOCK_SIZE) * BLOCK_SIZE, device=self.device)
        mask = (slots < len(likely)).view(-1, BLOCK_SIZE)
        chances = likely.new_zeros(mask.shape)
        chances[mask] = (1 - ALPHA) * likely + ALPHA
        return plain_acceptance_weights(chances, mask)[mask]

    def _weights(self, case: Case) -> Tensor | AcceptanceWeights:
        if case.weighting == "decay":
            return self.weights
        slots = torch.arange(len(self.labels), device=self.device)
        counts = [min(BLOCK_SIZE, len(slots) - i) for i in range(0, len(slots), BLOCK_SIZE)]
        return AcceptanceWeights(case.weighting, ALPHA, BlockSlots(counts, slots, BLOCK_SIZE))

    def recompute(self) -> tuple[Tensor, ...]:
        loss = self.hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, len(self.labels), self.chunk_rows):
            part = slice(first, first + self.chunk_rows)
            inputs = part, self.hidden[part], self.latent[part], self.w2, self.weights[part]
            options = dict(use_reentrant=False, preserve_rng_state=False)
            loss = loss + checkpoint(self._plain_rows, *inputs, **options)[0]
        return self.gradients(loss)

    def _plain_rows(
        self,
        part: slice,
        hidden: Tensor,
        latent: Tensor,
        w2: Tensor,
        weights: Tensor,
        softcapping: float | None = None,
        case: Case = DEFAULT,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = hidden, latent, self.target_hidden[part], self.labels[part], weights
        capped = dict.fromkeys(("draft_transform", "target_transform"), (1.0, softcapping))
        return plain_head_loss(*rows, self.lm_head, w2, terms=case.objective.by_name, **capped)

    def capped(self) -> tuple[Tensor, ...]:
        """The head loss with a soft cap of both sides, in chunks of the same budget."""
        return self.head_loss(LogitTransform(1.0, self.softcapping), self.capped_rows)

    def head_loss(
        self,
        transform: LogitTransform = IDENTITY,
        rows_of_chunk: int | None = None,
        case: Case = DEFAULT,
    ) -> tuple[Tensor, ...]:
        head = HeadWeights(self.output_weight, self.w2, self.shard, transform)
        how = rows_of_chunk or self.chunk_rows, self.compile, transform
        head_loss = HeadLoss(head, case.objective, *how, tp_group=self.group)
        rows = self.hidden, self.latent, self.target_hidden, self.labels, self._weights(case)
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
