"""The chunks of the head loss: products with the vocabulary, passes over logits, collectives.

A chunk pauses while one of its collectives is under way. With more than one rank two chunks take
turns, each in its own buffers, so that one computes while the other's few floats a row travel.

Shapes: n rows, c rows of a chunk, h hidden, r Markov rank, v/tp columns of this rank.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dspark_megatron.ops import logit_terms
from dspark_megatron.ops.chunk_budget import lanes_of, tail_padding
from dspark_megatron.ops.logit_terms import ChunkLogits, Objective
from dspark_megatron.ops.vocab_parallel import (
    Pending,
    VocabShard,
    start_all_gather,
    start_all_reduce,
)


@dataclass(frozen=True)
class HeadWeights:
    """This rank's rows of the vocabulary matrices."""

    joint: Tensor
    """[v/tp, h + r], frozen: the LM head and beside it room for `markov_w2`, so that draft logits
    are one product over [h z]. The loss fills the room anew at each call."""
    markov_w2: Tensor | None
    """[v/tp, r], trained; None without a Markov head."""
    shard: VocabShard

    @property
    def hidden_size(self) -> int:
        rank = 0 if self.markov_w2 is None else self.markov_w2.shape[1]
        return self.joint.shape[1] - rank

    @property
    def lm_head(self) -> Tensor:
        """[v/tp, h]"""
        return self.joint[:, : self.hidden_size]


class ChunkRun:
    """One call of the head loss: its inputs, and the results and gradients its chunks fill in."""

    def __init__(
        self,
        features: Tensor,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        head: HeadWeights,
        objective: Objective,
        *,
        chunk_rows: int,
        compile: bool,
        tp_group: dist.ProcessGroup,
    ) -> None:
        """features [n, h + r]; the rest as in `head_loss`."""
        self.features, self.teacher_hidden, self.weights = features, teacher_hidden, weights
        self.head, self.objective, self.tp_group = head, objective, tp_group
        rows = len(features)
        self.chunk_rows = max(1, min(chunk_rows, rows))
        self.passes = logit_terms.compiled_passes() if compile else logit_terms.PASSES
        padding = tail_padding(rows, self.chunk_rows) if compile else 0
        self.labels = F.pad(labels, (0, padding))
        # fp32 inside the softmax and for sums over chunks; float64 stays what it is.
        self.dtype = torch.promote_types(features.dtype, torch.float32)
        per_row = features.new_zeros(3, rows + padding, dtype=self.dtype)
        self._ce, self._l1, self._kl = per_row
        self.grad_features = torch.empty_like(features)
        """[n, h + r]"""
        self.grad_w2: Tensor | None = None
        """[v/tp, r] in fp32: many chunks add up in it."""
        if head.markov_w2 is not None:
            self.grad_w2 = torch.zeros_like(head.markov_w2, dtype=self.dtype)
        self._reductions: list[Pending] = []

    @property
    def ce(self) -> Tensor:
        """[n]"""
        return self._ce[: len(self.features)]

    @property
    def l1(self) -> Tensor | None:
        """[n]; None without a teacher."""
        return None if self.teacher_hidden is None else self._l1[: len(self.features)]

    @property
    def kl(self) -> Tensor | None:
        """[n]; None unless the objective weighs it."""
        return self._kl[: len(self.features)] if self.objective.kl > 0 else None

    def loss(self) -> Tensor:
        """[] weighted sum over rows."""
        terms = self.objective.ce * self._ce + self.objective.l1 * self._l1
        terms += self.objective.kl * self._kl
        return (self.weights * terms[: len(self.features)]).sum()

    @torch.no_grad()
    def all_chunks(self) -> None:
        head = self.head
        if head.markov_w2 is not None:
            head.joint[:, head.hidden_size :] = head.markov_w2
        starts = range(0, len(self.features), self.chunk_rows)
        lanes = min(lanes_of(self.tp_group.size()), len(starts))
        _take_turns([self._lane(starts[i::lanes]) for i in range(lanes)])
        for reduction in self._reductions:
            reduction.wait()

    def _lane(self, starts: range) -> Iterator[None]:
        """Every so many-th chunk, one after the other in the same buffers."""
        buffers = _Buffers(self)
        for start in starts:
            yield from self._chunk(slice(start, start + self.chunk_rows), buffers)

    def _chunk(self, part: slice, buffers: "_Buffers") -> Iterator[None]:
        """Results and gradients of some rows; pauses where a collective is under way."""
        objective, passes, labels = self.objective, self.passes, self.labels[part]
        logits = buffers.logits(len(labels))
        self._multiply_out(part, logits, buffers)
        columns, mine = self.head.shard.local_ids(labels)
        found = passes.statistics(logits, columns, mine, objective)
        gathered = start_all_gather(torch.stack(list(found.values())), tp_group=self.tp_group)
        yield
        shards = dict(zip(found, gathered.wait().unbind(dim=1), strict=True))
        combined = logit_terms.combine(shards)
        self._ce[part] = combined.ce
        if combined.kl is not None:
            self._kl[part] = combined.kl
        if combined.label_shard is not None:
            columns, mine = combined.label_column, combined.label_shard == self.tp_group.rank()
        row_scale = (found["draft_shift"] - combined.draft_lse).exp()
        if combined.teacher_lse is None:
            row_scale = row_scale * objective.ce
        else:
            teacher_scale = (found["teacher_shift"] - combined.teacher_lse).exp()
            sums = passes.distances(logits, row_scale, teacher_scale, objective.l1 > 0)
            reduced = start_all_reduce(sums, tp_group=self.tp_group)
            yield
            self._l1[part], signed_sum = reduced.wait()
            row_scale = objective.ce + objective.kl - objective.l1 * signed_sum
        at_label = -objective.ce * mine.to(self.dtype)
        passes.gradient(logits, row_scale, columns, at_label, objective)
        self._multiply_back(part, buffers)

    def _multiply_out(self, part: slice, logits: ChunkLogits, buffers: "_Buffers") -> None:
        head = self.head
        buffers.product(self.features[part], head.joint, logits.draft)
        head.shard.mask_padding_(logits.draft)
        if logits.teacher is not None:
            buffers.product(self.teacher_hidden[part], head.lm_head, logits.teacher)
            head.shard.mask_padding_(logits.teacher)

    def _multiply_back(self, part: slice, buffers: "_Buffers") -> None:
        """Gradients of this chunk's features, and its share of that of W2. Row weights are applied
        here, to the narrow side of the products."""
        features = self.features[part]
        gradient = buffers.for_products(len(features))  # [c, v/tp]
        weights = self.weights[part, None].to(features.dtype)
        grad_features = torch.mm(gradient, self.head.joint, out=self.grad_features[part])
        grad_features.mul_(weights)
        self._reductions.append(start_all_reduce(grad_features, tp_group=self.tp_group))
        if self.grad_w2 is not None:
            latents = features[:, self.head.hidden_size :] * weights
            if self.dtype == features.dtype:
                self.grad_w2.addmm_(gradient.t(), latents)
            else:
                self.grad_w2 += gradient.t() @ latents


class _Buffers:
    """Room for the logits of one chunk, [chunk_rows, v/tp] each."""

    def __init__(self, run: ChunkRun) -> None:
        def room(wanted: bool, dtype: torch.dtype) -> Tensor | None:
            return joint.new_empty(run.chunk_rows, len(joint), dtype=dtype) if wanted else None

        joint, dtype = run.head.joint, run.dtype
        self._rooms = ChunkLogits(
            draft=room(True, dtype),
            teacher=room(run.teacher_hidden is not None, dtype),
            kept=room(run.objective.kl > 0, dtype),
        )
        self._products = room(joint.dtype != dtype, joint.dtype)

    def logits(self, rows: int) -> ChunkLogits:
        rooms = self._rooms.draft, self._rooms.teacher, self._rooms.kept
        return ChunkLogits(*(None if room is None else room[:rows] for room in rooms))

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """a b^T into the first rows of `out`, by way of the products' own type."""
        out = out[: len(a)]
        if self._products is None:
            torch.mm(a, b.t(), out=out)
        else:
            out.copy_(torch.mm(a, b.t(), out=self._products[: len(a)]))

    def for_products(self, rows: int) -> Tensor:
        """The first rows of the draft's room, now their gradient, in the products' own type."""
        gradient = self._rooms.draft[:rows]
        return gradient if self._products is None else self._products[:rows].copy_(gradient)


def _take_turns(lanes: list[Iterator[None]]) -> None:
    """Run all to their ends, changing over at each pause."""
    waiting = deque(lanes)
    while waiting:
        lane = waiting.popleft()
        if next(lane, "end") != "end":
            waiting.append(lane)
