"""Provider `megatron`: a GPTModel of one pipeline stage."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import require
from dspark_megatron.ops.transfer import to_device
from dspark_megatron.targets.base import Target, TargetStates
from dspark_megatron.targets.megatron.frozen_gpt import FrozenGPT, output_logits, whole_rows
from dspark_megatron.targets.passes import states_in_passes


class MegatronTarget(FrozenGPT, Target):
    """Its decoder layers are tapped by forward hooks."""

    def __init__(
        self,
        model: GPTModel,
        target_layer_ids: tuple[int, ...],
        *,
        max_tokens_per_forward: int | None = None,
        with_last_hidden: bool = True,
        with_output_layer: bool = True,
    ) -> None:
        """model: as the user built and loaded it, with the process groups in its `pg_collection`;
        from here on it gives hidden states instead of logits. with_last_hidden: false keeps no
        decoder layer above the last tap. with_output_layer: false frees what only `own_logits`
        needs."""
        super().__init__(
            model,
            target_layer_ids,
            with_last_hidden=with_last_hidden,
            with_output_layer=with_output_layer,
        )
        self._max_tokens = max_tokens_per_forward
        self._with_last_hidden = with_last_hidden
        self.lockstep = self._shape_group is not None

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.decoder.layers

    def states(self, batch: Batch) -> TargetStates:
        input_ids = batch.input_ids
        if self._max_tokens is None:
            return replace(self._run(input_ids), positions=input_ids.numel())
        b, s = input_ids.shape
        # Passes are cut alike on all ranks that meet in them, or they would be padded beyond it.
        most_rows, longest = self._largest(b, s)
        require(
            longest <= self._max_tokens,
            f"target.max_tokens_per_forward ({self._max_tokens}) must hold a whole sample for "
            f"target.provider megatron, and one has {longest} tokens; raise it, or lower "
            "data.max_length",
        )
        found = states_in_passes(
            F.pad(input_ids, (0, longest - s, 0, most_rows - b)),
            self._max_tokens,
            lambda group: [self._run(piece) for piece in group.pieces],
            lockstep_group=None,
        )
        last_hidden = None if found.last_hidden is None else found.last_hidden[:b, :s]
        return TargetStates(found.taps[:b, :s], last_hidden, positions=input_ids.numel())

    # There is no key/value cache: sequences are kept as their tokens and run anew for every step,
    # so the work of an answer grows with the square of its length.

    def new_cache(self) -> list[Tensor]:
        return []

    def add_sequence(self, input_ids: Tensor, cache: list[Tensor]) -> TargetStates:
        cache.append(input_ids[0])
        return self._run(input_ids)

    def extend(self, input_ids: Tensor, cache: list[Tensor]) -> TargetStates:
        starts, width = [len(sequence) for sequence in cache], input_ids.shape[1]
        cache[:] = [torch.cat(pair) for pair in zip(cache, input_ids, strict=True)]
        states = self._run(pad_sequence(cache, batch_first=True))

        def new(hidden: Tensor) -> Tensor:  # [b, longest, x] -> [b, q, x]
            pairs = zip(hidden, starts, strict=True)
            return torch.stack([one[start : start + width] for one, start in pairs])

        return TargetStates(new(states.taps), new(states.hidden))

    def forget(self, cache: list[Tensor], tokens: list[int]) -> None:
        cache[:] = [one[: len(one) - n] for one, n in zip(cache, tokens, strict=True)]

    def keep(self, cache: list[Tensor], sequences: list[int]) -> None:
        cache[:] = [cache[i] for i in sequences]

    @torch.no_grad()
    def own_logits(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b, s, >= v] of the model's own output layer, and the last hidden states. Once:
        the layer is freed then. input_ids [b, s]."""
        model, (b, s) = self.model, input_ids.shape
        hidden = self._forward(input_ids)
        self._taps.take()
        logits = output_logits(model, hidden)
        model.output_layer = None
        return logits[:b, :s], whole_rows(model, hidden)[:b, :s]

    @torch.no_grad()
    def _run(self, input_ids: Tensor) -> TargetStates:
        b, s = input_ids.shape
        last_hidden = self._forward(input_ids)
        taps = whole_rows(self.model, torch.cat(self._taps.take(), dim=-1))[:b, :s]
        if not self._with_last_hidden:
            return TargetStates(taps, None)
        return TargetStates(taps, whole_rows(self.model, last_hidden)[:b, :s])

    def _forward(self, input_ids: Tensor) -> Tensor:
        """[s, b, h], or [s/tp, b, h] with sequence parallelism, of the padded input."""
        padded = self._padded(to_device(input_ids, self.device))
        positions = torch.arange(padded.shape[1], device=self.device).expand_as(padded)
        hidden = self.model(input_ids=padded, position_ids=positions, attention_mask=None)
        return hidden.detach()

    def _padded(self, input_ids: Tensor) -> Tensor:
        """Sequences and tokens that ranks need to fit together; what comes after a token does not
        change its states. One all-reduce of two numbers where data-parallel ranks meet in the
        experts, else none."""
        b, s = self._largest(*input_ids.shape)
        if self.model.config.sequence_parallel:
            tp = self.model.pg_collection.tp.size()
            s = math.ceil(s / tp) * tp
        return F.pad(input_ids, (0, s - input_ids.shape[1], 0, b - input_ids.shape[0]))

    def _largest(self, b: int, s: int) -> tuple[int, int]:
        """Sequences and tokens of the ranks that have most, where data-parallel ranks meet."""
        if self._shape_group is None:
            return b, s
        size = torch.tensor([b, s], device=self.device)
        dist.all_reduce(size, dist.ReduceOp.MAX, group=self._shape_group)
        return tuple(size.tolist())
