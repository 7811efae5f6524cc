"""Drafting at inference: a block of tokens for each sequence, from its anchor and its context.

Shapes: b sequences, d draft tokens of a block, v vocabulary (unpadded), m*h target features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dspark_megatron.config.attention import LayerAttention
from dspark_megatron.model.draft_model import ContextKV, DSparkDraftModel
from dspark_megatron.ops.attention.block_attention import BlockAttention, by_layer
from dspark_megatron.ops.attention.grouped import GroupedBlockAttention
from dspark_megatron.ops.transfer import ContextRanges
from dspark_megatron.ops.vocab_parallel import gather_vocab


@dataclass(frozen=True)
class Proposal:
    """What the draft puts before the target."""

    tokens: Tensor
    """[b, d] int64"""
    probs: Tensor
    """[b, d, v] fp32 distributions the tokens were drawn from."""
    confidence_logits: Tensor | None
    """[b, d] fp32; None without a confidence head."""


class Drafter:
    """A draft model with the context keys and values of several sequences. Each layer keeps what
    later blocks can see: all, or the last tokens of its window."""

    def __init__(self, model: DSparkDraftModel) -> None:
        self.model = model
        self.lengths: list[int] = []
        """Tokens of context of each sequence, those that no block sees any more included."""
        self._contexts: list[ContextKV] = []
        self._rules = model.layer_rules

    @torch.no_grad()
    def add(self, taps: Tensor) -> None:
        """Take in a sequence behind those there are: the target's states [q, m*h] of its tokens."""
        reach = self.model.shape.attention.reach(self.model.shape.num_layers)
        first = 0 if reach is None else max(0, len(taps) - max(1, reach))
        positions = torch.arange(first, len(taps), device=taps.device)
        self._contexts.append(self._seen(self.model.encode_context(taps[first:], positions)))
        self.lengths.append(len(taps))

    @torch.no_grad()
    def extend(self, taps: list[Tensor]) -> None:
        """Take in the target's states of the next tokens, [q, m*h] of each sequence."""
        sizes = [len(part) for part in taps]
        ends = [n + q for n, q in zip(self.lengths, sizes, strict=True)]
        positions = torch.cat(
            [torch.arange(end - q, end) for end, q in zip(ends, sizes, strict=True)]
        )
        new = self.model.encode_context(torch.cat(taps), positions.to(taps[0].device))
        parts = [zip(key.split(sizes), value.split(sizes), strict=True) for key, value in new]
        self._contexts = [
            self._seen([_joined(pair) for pair in zip(old, own, strict=True)])
            for old, own in zip(self._contexts, zip(*parts, strict=True), strict=True)
        ]
        self.lengths = ends

    def keep(self, sequences: list[int]) -> None:
        """Drop all sequences but these, in this order."""
        self._contexts = [self._contexts[i] for i in sequences]
        self.lengths = [self.lengths[i] for i in sequences]

    def _seen(self, context: ContextKV) -> ContextKV:
        """What blocks behind it see of a context; copies, so that the rest leaves memory."""
        kept = []
        for rule, (key, value) in zip(self._rules, context, strict=True):
            first = 0 if rule.reach is None else max(0, len(key) - rule.reach)
            kept.append((key[first:].clone(), value[first:].clone()) if first else (key, value))
        return kept

    def _attention(self, device: torch.device, rule: LayerAttention) -> BlockAttention:
        """One block behind each context: nothing that flex could do better."""
        reach = max(self.lengths, default=0) if rule.reach is None else rule.reach
        ends = list(accumulate((min(n, reach) for n in self.lengths), initial=0))
        ranges = ContextRanges.of(list(pairwise(ends)), device)
        return GroupedBlockAttention(
            ranges, self.model.shape.block_size, ends[-1], rule, group_size=1
        )

    @torch.no_grad()
    def propose(
        self, anchor_token_ids: Tensor, pick: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Proposal:
        """Draft a block for each sequence, whose anchors [b] follow its context. `pick` draws from
        logits [b, v]: tokens [b] and distributions [b, v], the same on every tensor-parallel
        rank. Collectives: those of the backbone, and those of `step` for each draft token."""
        device = anchor_token_ids.device
        positions = torch.tensor(self.lengths, device=device)
        attention = by_layer(self._rules, partial(self._attention, device))
        layers = zip(*self._contexts, strict=True)
        context_kv = [_joined(layer) for layer in layers]
        hidden = self.model.backbone(anchor_token_ids, positions, context_kv, attention)
        tokens, state = anchor_token_ids, None
        drawn, probs, confidence = [], [], []
        for own in hidden.unbind(1):
            logits, confidence_logits, state = self.step(tokens, own, state)
            tokens, distributions = pick(logits)
            drawn.append(tokens)
            probs.append(distributions)
            if confidence_logits is not None:
                confidence.append(confidence_logits)
        return Proposal(
            torch.stack(drawn, dim=1),
            torch.stack(probs, dim=1),
            torch.stack(confidence, dim=1) if confidence else None,
        )

    def step(
        self, prev_token_ids: Tensor, hidden: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One slot: previous tokens [b], hidden [b, h], Markov state -> whole logits [b, v],
        confidence logits [b] or None, and the next Markov state. One all-reduce (W1) and one
        all-gather of the logits."""
        model, embedding, latent = self.model, None, None
        if model.markov_head is not None:
            embedding = model.markov_head.embed(prev_token_ids)
            latent, state = model.markov_head.step(embedding, hidden, state)
        logits = model.draft_logits(hidden, latent)  # [b, v/tp]
        confidence_logits = None
        if model.confidence_head is not None:
            confidence_logits = model.confidence_head(hidden, embedding)
        whole = gather_vocab(logits, model.shape.vocab_size, tp_group=model.tp_group)
        return whole, confidence_logits, state


def _joined(parts: tuple[tuple[Tensor, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """Keys and values [t, g/tp, d] of several parts, one behind the other."""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys), torch.cat(values)
