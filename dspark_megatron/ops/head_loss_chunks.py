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
from torch import Tensor

from dspark_megatron.ops import logit_passes, logit_terms
from dspark_megatron.ops.chunk_budget import bucket, lanes_of, tile_rows
from dspark_megatron.ops.logit_terms import Objective
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

    @torch.no_grad()
    def fill_joint(self) -> Tensor:
        """`joint`, once the present `markov_w2` is in its room."""
        if self.markov_w2 is not None:
            self.joint[:, self.hidden_size :] = self.markov_w2
        return self.joint


class ChunkRun:
    """One call of the head loss: its inputs, and the results and gradients its chunks fill in."""

    def __init__(
        self,
        features: Tensor,
        target_hidden: Tensor | None,
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
        self.features, self.target_hidden, self.weights = features, target_hidden, weights
        self.head, self.objective, self.tp_group = head, objective, tp_group
        rows = len(features)
        self.lanes = lanes_of(tp_group.size(), chunk_rows)
        whole = chunk_rows // self.lanes
        tail, padding = rows % whole, 0
        if compile and tail:
            padding = bucket(tail, whole) - tail
        self.chunk_rows = max(1, min(whole, rows + padding))
        real = head.shard.num_real  # padded columns come last and never reach a product
        self.joint, self.lm_head = head.joint[:real], head.lm_head[:real]
        if compile:
            self.passes = logit_passes.compiled_passes()
        else:
            tile = min(tile_rows(real, head.joint.device), self.chunk_rows)
            self.passes = logit_passes.tiled_passes(tile, head.joint[:, :1].t()[:, :real])
        self.labels = torch.cat([labels, labels.new_zeros(padding)])
        dtype = logit_terms.precise(features.dtype)
        self.per_row = features.new_zeros(3, rows + padding, dtype=dtype)
        """CE, L1 and KL, [3, n and padding]."""
        self.grad_features = torch.empty_like(features)
        """[n, h + r]"""
        self.grad_w2: Tensor | None = None
        """[v/tp, r] in fp32: many chunks add up in it."""
        if head.markov_w2 is not None:
            self.grad_w2 = torch.zeros_like(head.markov_w2, dtype=dtype)
        self._reductions: list[Pending] = []

    def results(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """CE, L1 and KL [n]; None for L1 without a teacher and for KL without weight."""
        ce, l1, kl = self.per_row[:, : len(self.features)]
        has_target, has_kl = self.target_hidden is not None, self.objective.kl > 0
        return ce, l1 if has_target else None, kl if has_kl else None

    def loss(self) -> Tensor:
        """[] weighted sum over rows."""
        ce, l1, kl = self.per_row[:, : len(self.features)]
        terms = self.objective.ce * ce + self.objective.l1 * l1 + self.objective.kl * kl
        return (self.weights * terms).sum()

    @torch.no_grad()
    def all_chunks(self) -> None:
        self.head.fill_joint()
        starts = range(0, len(self.features), self.chunk_rows)
        lanes = [starts[i :: self.lanes] for i in range(self.lanes)]
        _take_turns([self._lane(lane) for lane in lanes if lane])
        for reduction in self._reductions:
            reduction.wait()

    def _lane(self, starts: range) -> Iterator[None]:
        """Every so many-th chunk, one after the other in the same two buffers."""
        columns = len(self.joint)
        draft = self.joint.new_empty(self.chunk_rows, columns)
        teacher = None if self.target_hidden is None else torch.empty_like(draft)
        for start in starts:
            yield from self._chunk(slice(start, start + self.chunk_rows), draft, teacher)

    def _chunk(self, part: slice, draft: Tensor, teacher: Tensor | None) -> Iterator[None]:
        """Results and gradients of some rows; pauses where a collective is under way."""
        rows, real = len(self.labels[part]), len(self.features[part])
        draft = draft[:rows]  # [c, v/tp]
        torch.mm(self.features[part], self.joint.t(), out=draft[:real])
        if teacher is not None:
            teacher = teacher[:rows]
            torch.mm(self.target_hidden[part], self.lm_head.t(), out=teacher[:real])
        if self.tp_group.size() == 1:
            self.per_row[:, part] = self.passes.all_passes(
                draft, teacher, self.labels[part], self.objective
            )
        else:
            yield from self._split_passes(part, draft, teacher)
        self._multiply_back(part, draft[:real])

    def _split_passes(self, part: slice, draft: Tensor, teacher: Tensor | None) -> Iterator[None]:
        """The chunk's results; `draft` becomes the gradient of its logits. Two collectives."""
        objective, passes = self.objective, self.passes
        ce, l1, kl = self.per_row[:, part]
        columns, mine = self.head.shard.local_ids(self.labels[part])
        found = passes.statistics(draft, teacher, columns, mine, objective)
        gathered = start_all_gather(found, tp_group=self.tp_group)
        yield
        row = logit_terms.combine(gathered.wait())
        ce.copy_(row.ce)
        if row.label_shard is not None:
            mine = row.label_shard == self.tp_group.rank()
            columns = torch.where(mine, row.label_column, 0)
        lses, signed_sum = (row.draft_lse, row.target_lse), None
        if teacher is not None:
            sums = passes.distances(draft, teacher, *lses, objective)
            reduced = start_all_reduce(sums, tp_group=self.tp_group)
            yield
            total, signed_sum, *cross = reduced.wait()
            l1.copy_(total)
            if cross:
                kl.copy_(cross[0] - row.target_lse + row.draft_lse)
        passes.gradient(draft, teacher, *lses, signed_sum, columns, mine, objective)

    def _multiply_back(self, part: slice, gradient: Tensor) -> None:
        """From the gradient of logits [c, v/tp] to that of features and this chunk's share of that
        of W2. Row weights are applied here, to the narrow side of the products."""
        features, weights = self.features[part], self.weights[part, None]
        grad_features = torch.mm(gradient, self.joint, out=self.grad_features[part])
        grad_features.mul_(weights)
        self._reductions.append(start_all_reduce(grad_features, tp_group=self.tp_group))
        if self.grad_w2 is None:
            return
        latents = (features[:, self.head.hidden_size :] * weights).to(features.dtype)
        grad_w2 = self.grad_w2[: len(self.joint)]
        if grad_w2.dtype == latents.dtype:
            grad_w2.addmm_(gradient.t(), latents)
        else:
            grad_w2 += gradient.t() @ latents


def _take_turns(lanes: list[Iterator[None]]) -> None:
    """Run all to their ends, changing over at each pause."""
    waiting = deque(lanes)
    while waiting:
        lane = waiting.popleft()
        if next(lane, "end") != "end":
            waiting.append(lane)
