"""Drafting at inference: a block of tokens from an anchor and the context seen so far.

Shapes: one sequence; k slots, v vocabulary (unpadded), m*h target features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_megatron.model.draft_model import ContextKV, DSparkDraftModel
from dspark_megatron.ops.grouped_block_attention import GroupedBlockAttention
from dspark_megatron.ops.vocab_parallel import gather_vocab


@dataclass(frozen=True)
class Proposal:
    """What the draft puts before the target."""

    tokens: Tensor
    """[k] int64"""
    probs: Tensor
    """[k, v] fp32 distributions the tokens were drawn from."""
    confidence_logits: Tensor | None
    """[k] fp32; None without a confidence head."""


class Drafter:
    """A draft model with the context keys and values of one sequence."""

    def __init__(self, model: DSparkDraftModel) -> None:
        self.model = model
        self.length = 0
        self._context_kv: ContextKV | None = None

    @torch.no_grad()
    def extend(self, taps: Tensor) -> None:
        """Take in the target's states of the next q tokens, [q, m*h]."""
        positions = torch.arange(self.length, self.length + len(taps), device=taps.device)
        new = self.model.encode_context(taps, positions)
        if self._context_kv is None:
            self._context_kv = new
        else:
            self._context_kv = [
                (torch.cat([old_key, key]), torch.cat([old_value, value]))
                for (old_key, old_value), (key, value) in zip(self._context_kv, new, strict=True)
            ]
        self.length += len(taps)

    @torch.no_grad()
    def propose(
        self, anchor_token_id: Tensor, pick: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Proposal:
        """Draft a block whose anchor [1] follows the context. `pick` draws from logits [1, v]:
        the token [1] and the distribution [1, v], the same on every tensor-parallel rank."""
        k = self.model.shape.block_size
        positions = torch.arange(self.length, self.length + k, device=anchor_token_id.device)
        # One block and a context of any length: nothing that flex could do better.
        attend = GroupedBlockAttention(
            [(0, self.length)], k, self.length, group_size=1, device=positions.device
        )
        blocks = self.model.backbone(anchor_token_id, positions[None], self._context_kv, attend)
        hidden = blocks[0]  # [k, h]
        token, state = anchor_token_id, None
        tokens, probs, confidence = [], [], []
        for slot in range(k):
            logits, confidence_logit, state = self.step(token, hidden[slot : slot + 1], state)
            token, distribution = pick(logits)
            tokens.append(token)
            probs.append(distribution)
            confidence.append(confidence_logit)
        has_confidence = self.model.confidence_head is not None
        return Proposal(
            torch.cat(tokens),
            torch.cat(probs),
            torch.cat(confidence) if has_confidence else None,
        )

    def step(
        self, prev_token_id: Tensor, hidden: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One slot: previous token [1], hidden [1, h], Markov state -> whole logits [1, v],
        confidence logit [1] or None, and the next Markov state. One all-reduce (W1) and one
        all-gather of the logits."""
        model, embedding = self.model, None
        logits = hidden @ model.lm_head.t()  # [1, v/tp]
        if model.markov_head is not None:
            embedding = model.markov_head.embed(prev_token_id)
            latent, state = model.markov_head.step(embedding, hidden, state)
            logits.addmm_(latent, model.markov_head.markov_w2.weight.t())
        confidence_logit = None
        if model.confidence_head is not None:
            confidence_logit = model.confidence_head(hidden, embedding)
        whole = gather_vocab(logits, model.shape.vocab_size, tp_group=model.tp_group)
        return whole, confidence_logit, state
