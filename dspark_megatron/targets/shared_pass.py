"""One pass of the target for several coming micro-batches, whose states wait for their turn.

The target is frozen, so its states do not depend on when they are made, and how many samples it
takes at once need not be the draft's micro-batch. A sharded target is gathered once a pass.

Shapes: b samples of a micro-batch, s their length, m taps of width h.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_megatron.config import Config
from dspark_megatron.data.batch import Batch
from dspark_megatron.shape import DraftShape
from dspark_megatron.targets.base import Target, TargetStates


@dataclass(frozen=True)
class PassSize:
    """How much goes through the target together: a function of the settings alone, so the same on
    every rank and in the plan."""

    micro_batches: int
    samples: int
    sample_bytes: int
    """Of the states that are handed over, for a sample of `data.max_length` tokens."""

    @classmethod
    def of(
        cls, config: Config, shape: DraftShape, dtype: torch.dtype, *, dp_size: int
    ) -> "PassSize":
        """dtype: the target's. At least one micro-batch, and no more than a step has on a rank, or
        than its number of passes needs. One where no pass is shared: stored states have none, and
        pipeline stages have `parallel.pipeline_micro_batches`."""
        train, target = config.train, config.target
        layer_bytes = config.data.max_length * shape.hidden_size * dtype.itemsize
        layers = len(shape.target_layer_ids) + config.needs_target_logits
        of_step = max(1, train.global_batch_size // (train.micro_batch_size * dp_size))
        if target.is_stored or config.parallel.pipeline_parallel > 1:
            most = 1
        elif target.samples_per_pass is not None:
            most = target.samples_per_pass // train.micro_batch_size
        else:
            # At a pass's end all are there twice, while each micro-batch gets a copy of its own.
            most = _that_fit(config, 2 * layers * layer_bytes) // train.micro_batch_size
        passes = math.ceil(of_step / max(1, most))
        micro_batches = math.ceil(of_step / passes)
        return cls(micro_batches, micro_batches * train.micro_batch_size, layers * layer_bytes)

    def waiting_bytes(self) -> int:
        """The states in memory while the draft works on a pass's first micro-batch, its own among
        them: the most there are."""
        return self.samples * self.sample_bytes


def _that_fit(config: Config, bytes_of_a_sample: int) -> int:
    """Samples in `pass_memory_gib`. A pass that `max_tokens_per_forward` would cut into pieces
    takes no more than one piece holds: each gathers the weights anew."""
    target = config.target
    samples = int(target.pass_memory_gib * 2**30) // bytes_of_a_sample
    if target.max_tokens_per_forward is not None:
        samples = min(samples, target.max_tokens_per_forward // config.data.max_length)
    return samples


class SharedPasses(Target):
    """A target that runs the micro-batches it is told to expect several at a time."""

    def __init__(self, target: Target, micro_batches: int, *, packs: bool = False) -> None:
        """micro_batches: that are run together, at most. In one pass where ranks call in lockstep,
        who must be told of equally many, and where the target packs samples; else in as many as
        there are kinds of length."""
        self._target, self._micro_batches = target, micro_batches
        self._in_one_pass = target.lockstep or packs
        self.lockstep, self.device, self.dtype = target.lockstep, target.device, target.dtype
        self._expected: deque[Batch] = deque()
        self._waiting: deque[tuple[Batch, TargetStates]] = deque()

    def expect(self, batches: Sequence[Batch]) -> None:
        self._waiting.clear()
        self._expected = deque(batches)

    def states(self, batch: Batch) -> TargetStates:
        """Those of the next expected micro-batch, which this must be; of any samples when none is
        expected."""
        if not self._waiting:
            if not self._expected:
                return self._target.states(batch)
            self._run()
        expected, states = self._waiting.popleft()
        same = expected.input_ids.shape == batch.input_ids.shape
        assert same and expected.sample_indices == batch.sample_indices, (
            "states are asked for in another order than announced"
        )
        return states

    def _run(self) -> None:
        count = min(self._micro_batches, len(self._expected))
        batches = [self._expected.popleft() for _ in range(count)]
        lengths = [batch.input_ids.shape[1] for batch in batches]
        states: dict[int, TargetStates] = {}
        for places in [range(count)] if self._in_one_pass else alike(lengths):
            together = [batches[place] for place in places]
            found = self._target.states(side_by_side(together))
            states.update(zip(places, apart(found, together), strict=True))
        self._waiting.extend((batch, states[place]) for place, batch in enumerate(batches))


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Places of micro-batches that go through a target together, the longest first: so many that
    padding them to one length adds a tenth at most."""
    runs: list[list[int]] = []
    own = 0
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        own += lengths[place]
        if not runs or (len(runs[-1]) + 1) * lengths[runs[-1][0]] > 1.1 * own:
            runs.append([])
            own = lengths[place]
        runs[-1].append(place)
    return runs


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """All samples as one batch, padded to the longest."""
    if len(batches) == 1:
        return batches[0]
    longest = max(batch.input_ids.shape[1] for batch in batches)
    ids = [F.pad(x.input_ids, (0, longest - x.input_ids.shape[1])) for x in batches]
    known = [batch.lengths for batch in batches if batch.lengths is not None]
    indices = [index for batch in batches for index in batch.sample_indices]
    lengths = sum(known, []) if len(known) == len(batches) else None
    return Batch(torch.cat(ids), lengths, tuple(indices))


def apart(states: TargetStates, batches: Sequence[Batch]) -> list[TargetStates]:
    """The states of each batch, without what pads it to the longest of them. Copies: the memory of
    one is free when it has been used. Positions of the pass are shared out by samples."""
    if len(batches) == 1:
        return [states]
    taps = _rows(states.taps, batches)
    last_hidden: Sequence[Tensor | None] = [None] * len(batches)
    if states.last_hidden is not None:
        last_hidden = _rows(states.last_hidden, batches)
    return [
        TargetStates(*parts)
        for parts in zip(taps, last_hidden, _shares(states.positions, batches), strict=True)
    ]


def _rows(whole: Tensor, batches: Sequence[Batch]) -> list[Tensor]:
    parts = whole.split([len(batch.input_ids) for batch in batches])
    pairs = zip(parts, batches, strict=True)
    return [part[:, : batch.input_ids.shape[1]].clone() for part, batch in pairs]


def _shares(positions: int | None, batches: Sequence[Batch]) -> list[int | None]:
    if positions is None:
        return [None] * len(batches)
    total, before = sum(len(batch.input_ids) for batch in batches), 0
    shares: list[int | None] = []
    for batch in batches:
        after = before + len(batch.input_ids)
        shares.append(positions * after // total - positions * before // total)
        before = after
    return shares
