"""What pipeline ranks give each other: micro-batches before the run, states after it.

In a run of P ranks, place j * P + p is micro-batch j of pipeline rank p, its owner. Layers ascend
over the stages, so what the stages keep of a micro-batch, side by side in the order of their ranks,
is its taps and then its last hidden state.

Shapes: b samples of s tokens, w numbers that a stage keeps of a token.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather_batches(own: Sequence[Tensor], *, pp_group: dist.ProcessGroup) -> list[Tensor]:
    """The ids [b, s] of all ranks' micro-batches, in the order of the run; each rank has equally
    many, of any shape, on the device of the group. Two all-gathers: of shapes, and of ids, padded
    to those of the rank that has most."""
    shapes = own[0].new_tensor([batch.shape for batch in own])  # [n, 2]
    shapes = _all_gather(shapes, pp_group)  # [P, n, 2]
    most = int(shapes.prod(dim=2).sum(dim=1).max())
    ids = torch.cat([batch.flatten() for batch in own])
    ids = _all_gather(torch.nn.functional.pad(ids, (0, most - len(ids))), pp_group)  # [P, most]
    by_rank = []
    for sent, of_rank in zip(ids, shapes.tolist(), strict=True):
        sizes = [b * s for b, s in of_rank]
        parts = sent[: sum(sizes)].split(sizes)
        by_rank.append([x.view(b, s) for x, (b, s) in zip(parts, of_rank, strict=True)])
    return [batch for ones in zip(*by_rank, strict=True) for batch in ones]


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of all ranks, one on the other: [P, ...]."""
    out = tensor.new_empty((group.size() * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor.contiguous(), group=group)
    return out.view(group.size(), *tensor.shape)


class Outbox:
    """What this stage keeps of a run, laid out by owner, so that it is sent as it lies."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        widths: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        pp_group: dist.ProcessGroup,
    ) -> None:
        """shapes: (s, b) by place in the run. widths: w of every stage."""
        self.pp_group, self._widths = pp_group, list(widths)
        size, rank = pp_group.size(), pp_group.rank()
        self._own = list(shapes[rank::size])
        width = widths[rank]
        by_owner = [place for owner in range(size) for place in range(owner, len(shapes), size)]
        sizes = [shapes[place][0] * shapes[place][1] * width for place in by_owner]
        self._flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        self._sent = [sum(s * b * width for s, b in shapes[owner::size]) for owner in range(size)]
        parts = zip(by_owner, self._flat.split(sizes), strict=True)
        self.states = {place: part.view(*shapes[place], width) for place, part in parts}
        """By place in the run: [s, b, w], to be filled in."""

    def deliver(self) -> list[list[Tensor]]:
        """Send all to their owners: for each own micro-batch [s, b, w] of every stage. One
        all-to-all, in which a rank sends what it kept of micro-batches and gets what others kept of
        its own."""
        tokens = [s * b for s, b in self._own]
        counts = [sum(tokens) * width for width in self._widths]
        received = self._flat.new_empty(sum(counts))
        dist.all_to_all_single(received, self._flat, counts, self._sent, group=self.pp_group)
        by_stage = [
            part.split([n * width for n in tokens])
            for part, width in zip(received.split(counts), self._widths, strict=True)
        ]
        return [
            [part.view(*shape, w) for part, w in zip(parts, self._widths, strict=True)]
            for shape, parts in zip(self._own, zip(*by_stage, strict=True), strict=True)
        ]
