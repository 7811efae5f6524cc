"""The implementations that `benchmark_step.py` compares: plain ones and ours, on equal weights.

Import it when Megatron-Core is ready for this machine. Shapes: one sample of s tokens, n anchors,
k slots, h hidden, m target layers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import benchmarking  # noqa: F401  makes `reference` importable
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_megatron.config import LossConfig, OptimizerConfig
from dspark_megatron.conversion.layouts.names import to_hugging_face
from dspark_megatron.data.batch import Batch, MicroBatch
from dspark_megatron.data.blocks import draft_blocks
from dspark_megatron.data.conversation import Sample
from dspark_megatron.mcore.optimizer import wrap_data_parallel
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.shape import DraftShape
from dspark_megatron.targets.base import StatesSource, TargetStates
from dspark_megatron.training.metrics import MetricSums
from dspark_megatron.training.step import GradientStep
from support import reference
from support.reference import (
    PlainAttention,
    PlainBlocks,
    PlainDraft,
    PlainOutput,
    context_mask,
    plain_blocks,
    plain_loss,
)


class Item(NamedTuple):
    """One sample with its anchors and the target's states."""

    sample: Sample
    anchors: Tensor
    """[n]"""
    states: TargetStates
    """Of a batch of one."""


class PlainInputs(NamedTuple):
    """What the plain twin makes of an item in loops of Python: here once, outside its time."""

    input_ids: Tensor
    """[s]"""
    anchors: Tensor
    """[num_anchors], fillers at 0"""
    blocks: PlainBlocks
    mask: Tensor
    """[num_anchors * k, s + num_anchors * k]"""


@functools.cache
def plain_inputs(item: Item, num_anchors: int, slots: int, device: torch.device) -> PlainInputs:
    ids, loss_mask = item.sample
    anchors = F.pad(item.anchors, (0, num_anchors - len(item.anchors)))
    blocks = plain_blocks(ids, loss_mask, anchors, slots)
    return PlainInputs(
        ids.to(device),
        anchors.to(device),
        PlainBlocks(*(x.to(device) for x in blocks)),
        context_mask(anchors, len(ids), slots).to(device),
    )


class SdpaAttention(PlainAttention):
    """The plain attention with its scores inside one fused call."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        sides = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(*sides, attn_mask=mask)  # [1, a, n*k, d]
        return out[0].transpose(0, 1)


class PlainStep:
    """Gradients by the plain twin. As DeepSpec does, it computes `num_anchors` blocks of every
    sample, fillers at position 0 without weight, and all slots of each."""

    def __init__(self, draft: DSparkDraftModel, num_anchors: int, *, fused_attention: bool) -> None:
        shape = draft.shape
        trained = {n: p.detach() for n, p in draft.named_parameters() if p.requires_grad}
        frozen = {
            "embed_tokens.weight": draft.embed_tokens.weight,
            "lm_head.weight": draft.lm_head,
        }
        self.twin = PlainDraft(shape)
        self.twin.load_state_dict({**dict(to_hugging_face(shape, trained.__getitem__)), **frozen})
        self.device = draft.embed_tokens.weight.device
        self.twin.to(device=self.device, dtype=draft.embed_tokens.weight.dtype)
        self.num_anchors, self.loss = num_anchors, LossConfig()
        if fused_attention:
            for layer in self.twin.layers:
                layer.self_attn.__class__ = SdpaAttention

    def __call__(self, item: Item) -> float:
        self.twin.zero_grad(set_to_none=False)
        slots, real = self.twin.shape.block_size, len(item.anchors)
        made = plain_inputs(item, self.num_anchors, slots, self.device)
        ready = dict(plain_blocks=lambda *_, **__: made.blocks, context_mask=lambda *_: made.mask)
        # The twin makes its positions on the device it is told, and these in Python loops.
        with torch.device(self.device), mock.patch.multiple(reference, **ready):
            loss = self._loss(
                item,
                made,
                self.twin(item.states.taps[0], made.input_ids, made.anchors),  # not kept
                torch.arange(self.num_anchors) < real,
            )
            loss.backward()
        return loss.item()

    def _loss(self, item: Item, made: PlainInputs, out: PlainOutput, real: Tensor) -> Tensor:
        """real [num_anchors]: no filler."""
        at = made.anchors[:, None] + torch.arange(self.twin.shape.block_size)
        last_hidden = item.states.last_hidden[0][at.clamp(max=len(made.input_ids) - 1)]
        loss = self.loss
        terms = plain_loss(
            out.logits,
            self.twin.lm_head(last_hidden),
            made.blocks.labels,
            made.blocks.eval_mask & real[:, None],
            out.confidence_logits,
            loss.loss_decay_gamma,
            (loss.terms.ce, loss.terms.l1, loss.confidence_head_alpha),
        )
        return terms["loss_sum"] / terms["weight"]


class OurStep:
    """Gradients by `GradientStep`, one sample a step."""

    def __init__(self, draft: DSparkDraftModel, runtime: Runtime, loss: LossConfig) -> None:
        self.device, self.slots, self.loss = runtime.device, draft.shape.block_size, loss
        self.target = PreparedTarget()
        self.step = GradientStep(
            loss,
            wrap_data_parallel(draft, OptimizerConfig(use_distributed_optimizer=False)),
            self.target,
            tp_group=runtime.tp_group,
            dp_group=runtime.dp_group,
            device=runtime.device,
        )

    def __call__(self, item: Item) -> float:
        return self.gradients(item).means(self.step.forward_step.term_weights)["loss"]

    def gradients(self, item: Item) -> MetricSums:
        """The step without a look at its loss, for which the host would wait."""
        ids, loss_mask = item.sample
        blocks = draft_blocks([ids], [loss_mask], [item.anchors], self.slots, self.loss)
        self.target.prepared = item.states
        metrics = MetricSums.zeros(self.slots, self.device)
        self.step.run([MicroBatch.of([ids], blocks)], metrics)
        return metrics


class PreparedTarget(StatesSource):
    """Stands for the target: its states were made before."""

    prepared: TargetStates
    lockstep = False

    def states(self, batch: Batch) -> TargetStates:
        return self.prepared


def build_draft(
    shape: DraftShape, runtime: Runtime, dtype: torch.dtype, **options: Any
) -> DSparkDraftModel:
    """A draft with random weights, the same at each call; a vocabulary without padding."""
    place = dict(tp_group=runtime.tp_group, device=runtime.device)
    draft = DSparkDraftModel(shape, **place, params_dtype=dtype, **options)
    draft.init_weights(seed=1, std=0.02)
    generator = torch.Generator(runtime.device).manual_seed(2)
    size, place = (shape.vocab_size, shape.hidden_size), dict(device=runtime.device)
    mine = slice(draft.vocab_shard.vocab_start_index, draft.vocab_shard.vocab_end_index)
    embed, head = (torch.randn(size, generator=generator, **place)[mine] for _ in range(2))
    # Logits of a spread of about 3, as a trained model has.
    draft.load_frozen_replicas(embed * 0.02, head * 3 * shape.hidden_size**-0.5)
    return draft


def random_states(
    shape: DraftShape, tokens: int, generator: torch.Generator, like: Tensor
) -> TargetStates:
    """States of one sample, of the dtype and device of `like`."""
    widths = len(shape.target_layer_ids) * shape.hidden_size, shape.hidden_size
    return TargetStates(
        *(torch.randn(1, tokens, width, generator=generator).to(like) for width in widths)
    )


def step_variants(
    shape: DraftShape,
    runtime: Runtime,
    num_anchors: int,
    dtype: torch.dtype,
    loss: LossConfig,
    **options: Any,
) -> dict[str, Callable[[Item], float]]:
    """By name, each a function that leaves an item's gradients and returns its loss. loss: of
    ours, whose mathematics must be the default; options: of our model."""
    draft = build_draft(shape, runtime, dtype, **options)
    small = build_draft(shape, runtime, dtype, **options, recompute_activations=True)
    return {
        "plain": PlainStep(draft, num_anchors, fused_attention=False),
        "plain, SDPA": PlainStep(draft, num_anchors, fused_attention=True),
        "ours": OurStep(draft, runtime, loss),
        "ours, recompute": OurStep(small, runtime, loss),
    }
