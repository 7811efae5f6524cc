"""A frozen GPTModel in pipeline stages, each rank of which has micro-batches of its own.

Layers are split over the stages and the draft is not: all P ranks of a pipeline train a replica of
it. So a run takes the micro-batches of all of them through the stages, and gives each rank the
states of its own.
"""

import math
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from dspark_megatron.data.batch import Batch
from dspark_megatron.ops.transfer import to_device
from dspark_megatron.targets.base import StatesSource, TargetStates
from dspark_megatron.targets.megatron.exchange import Outbox, gather_batches
from dspark_megatron.targets.megatron.frozen_gpt import FrozenGPT, output_logits, whole_rows
from dspark_megatron.targets.megatron.schedule import run_forward


class PipelineTarget(FrozenGPT, StatesSource):
    """This rank's stage. Its taps, and the last stage's output, are kept for their owners."""

    lockstep = True

    def __init__(
        self,
        model: GPTModel,
        target_layer_ids: tuple[int, ...],
        *,
        micro_batches_per_run: int | None = None,
        with_last_hidden: bool = True,
        with_output_layer: bool = True,
    ) -> None:
        """model: this stage of it, with the process groups in its `pg_collection`; from here on it
        gives hidden states instead of logits. micro_batches_per_run: of each rank; None: all that
        are expected. with_last_hidden: false keeps no decoder layer above the last tap.
        with_output_layer: false frees what only `own_logits` needs.

        One all-gather of a number over the pipeline."""
        super().__init__(
            model,
            target_layer_ids,
            with_last_hidden=with_last_hidden,
            with_output_layer=with_output_layer,
        )
        self.pp_group = model.pg_collection.pp
        self._per_run = micro_batches_per_run
        self._taps_width = len(target_layer_ids) * model.config.hidden_size
        last_stage = self.pp_group.rank() == self.pp_group.size() - 1
        self._keeps_output = with_last_hidden and last_stage
        self._widths = self._widths_of_stages()
        self._expected: deque[Batch] = deque()
        self._arrived: deque[tuple[Batch, list[Tensor]]] = deque()

    def expect(self, batches: Sequence[Batch]) -> None:
        self._expected.extend(batches)

    def states(self, batch: Batch) -> TargetStates:
        """Whenever what has arrived is used up: two all-gathers, a receive and a send for each
        micro-batch of the run and one all-to-all. With sequence parallelism one all-gather in any
        case."""
        if not self._arrived:
            self._run(self._next_run() or [batch])
        expected, parts = self._arrived.popleft()
        b, s = batch.input_ids.shape
        same = expected.input_ids.shape == (b, s), expected.sample_indices == batch.sample_indices
        assert all(same), "states are asked for in another order than announced"
        states = whole_rows(self.model, torch.cat(parts, dim=-1))  # [>= b, >= s, m*h (+ h)]
        taps, last_hidden = states[:b, :s].tensor_split([self._taps_width], dim=-1)
        positions = states.shape[0] * states.shape[1]
        return TargetStates(taps, last_hidden if last_hidden.shape[-1] else None, positions)

    @torch.no_grad()
    def own_logits(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b, s, >= v] of the last stage's output layer, and the last hidden states. Once:
        the layer is freed then. input_ids [b, s], the same on all pipeline ranks. What `states`
        takes, and a broadcast over the pipeline."""
        outputs, (b, s) = [], input_ids.shape
        hook = self.model.register_forward_hook(lambda _model, _inputs, x: outputs.append(x))
        last_hidden = self.states(Batch(input_ids)).hidden
        hook.remove()
        last, size = self.pp_group.size() - 1, (b, s, self.model.vocab_size)
        logits = torch.empty(size, dtype=self.dtype, device=self.device)
        if self.pp_group.rank() == last:
            logits.copy_(output_logits(self.model, outputs[-1])[:b, :s])
            self.model.output_layer = None
        dist.broadcast(logits, dist.get_global_rank(self.pp_group, last), group=self.pp_group)
        return logits, last_hidden

    def _next_run(self) -> list[Batch]:
        count = min(self._per_run or len(self._expected), len(self._expected))
        return [self._expected.popleft() for _ in range(count)]

    def _run(self, own: list[Batch]) -> None:
        """All pipeline ranks call it with equally many micro-batches."""
        ids = [to_device(batch.input_ids, self.device) for batch in own]
        batches = self._padded(gather_batches(ids, pp_group=self.pp_group))
        h, parts = self.model.config.hidden_size, self._sequence_parts
        shapes = [(s // parts, b) for b, s in (ids.shape for ids in batches)]
        outbox = Outbox(shapes, self._widths, self.dtype, self.device, pp_group=self.pp_group)

        def run_stage(number: int) -> Tensor:
            ids = batches[number]
            positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
            output = self.model(input_ids=ids, position_ids=positions, attention_mask=None)
            kept = [*self._taps.take(), *([output] if self._keeps_output else [])]
            if kept:
                torch.cat(kept, dim=-1, out=outbox.states[number])
            return output

        sent = [(*shape, h) for shape in shapes]
        run_forward(self.model, run_stage, sent, pg_collection=self.model.pg_collection)
        self._arrived.extend(zip(own, outbox.deliver(), strict=True))

    def _padded(self, batches: list[Tensor]) -> list[Tensor]:
        """Sequences and tokens that ranks need to fit together; what comes after a token does not
        change its states. One all-reduce of two numbers for each where data-parallel ranks meet in
        the experts, else none."""
        sizes = torch.tensor([ids.shape for ids in batches], device=self.device)  # [n, 2]
        if self._shape_group is not None:
            dist.all_reduce(sizes, dist.ReduceOp.MAX, group=self._shape_group)
        parts, padded = self._sequence_parts, []
        for ids, (b, s) in zip(batches, sizes.tolist(), strict=True):
            s = math.ceil(s / parts) * parts
            padded.append(F.pad(ids, (0, s - ids.shape[1], 0, b - ids.shape[0])))
        return padded

    @property
    def _sequence_parts(self) -> int:
        """Into which sequence parallelism splits the tokens of a sequence."""
        return self.model.pg_collection.tp.size() if self.model.config.sequence_parallel else 1

    def _widths_of_stages(self) -> list[int]:
        """Numbers that each stage keeps of a token."""
        kept = len(self._taps.ids) + self._keeps_output
        own = torch.tensor([kept * self.model.config.hidden_size], device=self.device)
        widths = own.new_empty(self.pp_group.size())
        dist.all_gather_into_tensor(widths, own, group=self.pp_group)
        return widths.tolist()
