"""The plain twin that all parallel code is compared with: one process, dense masks, full softmax.

Parameter names are those of the exported checkpoint, so an export loads with `strict=True`.
Everything is written the obvious way; nothing here is fast, and nothing is shared with the code
under test.

Shapes: one sample of s tokens, n anchors, k slots, m target layers, h hidden, r Markov rank,
v vocabulary (unpadded), a query heads, d head width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from dspark_megatron.config.attention import FULL, LayerAttention
from dspark_megatron.config.objective.terms import LossWeighting
from dspark_megatron.shape import DraftShape

DECAY = LossWeighting()


class PlainOutput(NamedTuple):
    logits: Tensor
    """[n, k, v] draft logits, Markov bias included."""
    confidence_logits: Tensor | None
    """[n, k]; None without a confidence head."""
    hidden: Tensor
    """[n, k, h] after the final norm."""


class PlainBlocks(NamedTuple):
    prev_token_ids: Tensor
    """[n, k]"""
    labels: Tensor
    """[n, k]; 0 past the end of the sample."""
    eval_mask: Tensor
    """[n, k] bool"""


def plain_candidates(loss_mask: Tensor, anchor_rule: str = "label") -> list[int]:
    """Positions of one sample that may be anchors. loss_mask [s]."""
    found = []
    for a in range(len(loss_mask) - 1):
        if loss_mask[a] and (anchor_rule == "token" or loss_mask[a + 1]):
            found.append(a)
    return found


def plain_blocks(
    input_ids: Tensor,
    loss_mask: Tensor,
    anchors: Tensor,
    block_size: int,
    supervised_slots: str = "prefix",
    slot_mask: str = "label",
    sample_from_anchor: bool = True,
) -> PlainBlocks:
    """Blocks of one sample, those without a supervised slot included. input_ids, loss_mask [s];
    anchors [n]."""
    if not sample_from_anchor:
        return _blocks_behind_the_anchor(
            input_ids, loss_mask, anchors, block_size, supervised_slots
        )
    prev, labels, mask = [], [], []
    for anchor in anchors.tolist():
        tokens = [
            int(input_ids[p]) if p < len(input_ids) else 0
            for p in range(anchor, anchor + block_size + 1)
        ]
        gap, row = False, []
        for p in range(anchor + 1, anchor + block_size + 1):
            decides = p if slot_mask == "label" else p - 1
            supervised = p < len(input_ids) and bool(loss_mask[decides])
            gap = gap or not supervised
            row.append(supervised and not (gap and supervised_slots == "prefix"))
        prev.append(tokens[:-1])
        labels.append(tokens[1:])
        mask.append(row)
    return PlainBlocks(torch.tensor(prev), torch.tensor(labels), torch.tensor(mask))


def _blocks_behind_the_anchor(
    input_ids: Tensor, loss_mask: Tensor, anchors: Tensor, block_size: int, supervised_slots: str
) -> PlainBlocks:
    """Where slot 0 drafts nothing: it has no label and is never supervised. Slot j predicts the
    token at its own position a + j, behind that at a + j - 1."""
    s, n = len(input_ids), len(anchors)
    prev = torch.zeros(n, block_size, dtype=torch.long)
    labels = torch.zeros(n, block_size, dtype=torch.long)
    mask = torch.zeros(n, block_size, dtype=torch.bool)
    for i, a in enumerate(anchors.tolist()):
        gap = False
        prev[i, 0] = input_ids[a]
        for j in range(1, block_size):
            if a + j - 1 < s:
                prev[i, j] = input_ids[a + j - 1]
            if a + j < s:
                labels[i, j] = input_ids[a + j]
            learnt = a + j < s and bool(loss_mask[a + j])
            gap = gap or not learnt
            mask[i, j] = learnt and not (gap and supervised_slots == "prefix")
    return PlainBlocks(prev, labels, mask)


def qwen3_config(shape: DraftShape) -> Qwen3Config:
    """What Transformers' own Qwen3 classes need of a shape."""
    return Qwen3Config(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters=dict(shape.rope_parameters),
        max_position_embeddings=shape.max_position_embeddings,
    )


def context_mask(
    anchors: Tensor, seq_length: int, block_size: int, layer: LayerAttention = FULL
) -> Tensor:
    """[n*k, s + n*k] bool, true is visible: context strictly before the anchor, own block. With a
    window of W, slot j of anchor a sees the context from a + j - W + 1 on, or, measured from the
    anchor, from a - W on; a causal layer's slot does not see later ones."""
    n, k = len(anchors), block_size
    mask = torch.zeros(n * k, seq_length + n * k, dtype=torch.bool)
    for i, anchor in enumerate(anchors.tolist()):
        for j in range(k):
            row, first = mask[i * k + j], 0
            if layer.window is not None:
                first = anchor + j - layer.window + 1
                if layer.window_origin == "anchor":
                    first = anchor - layer.window
            row[max(0, first) : anchor] = True
            own = seq_length + i * k
            row[own : own + (j + 1 if layer.causal else k)] = True
    return mask


def plain_rotary(shape: DraftShape) -> nn.Module:
    """Transformers' Qwen3 has no RoPE of a part of each head, its GLM-4.5 has."""
    if "partial_rotary_factor" not in shape.rope_parameters:
        return Qwen3RotaryEmbedding(qwen3_config(shape))
    return Glm4MoeRotaryEmbedding(
        Glm4MoeConfig(
            head_dim=shape.head_dim,
            rope_parameters=dict(shape.rope_parameters),
            max_position_embeddings=shape.max_position_embeddings,
        )
    )


class PlainAttention(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.share = shape.num_attention_heads // shape.num_key_value_heads
        q_width = shape.num_attention_heads * shape.head_dim
        kv_width = shape.num_key_value_heads * shape.head_dim
        bias = shape.attention.biases
        self.q_proj = nn.Linear(shape.hidden_size, q_width, bias=bias)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, shape.hidden_size, bias=bias)
        self.q_norm = Qwen3RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.attention_sink_bias = None
        if shape.attention.sink:
            self.attention_sink_bias = nn.Parameter(torch.zeros(shape.num_attention_heads))

    def forward(
        self, hidden: Tensor, context: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """hidden [n*k, h], context [s, h], mask [n*k, s + n*k], rope cos/sin [s + n*k, d]."""
        cos, sin = rope
        query = self.q_norm(self._heads(self.q_proj(hidden)))  # [n*k, a, d]
        both = torch.cat([context, hidden])  # [s + n*k, h]
        key = self.k_norm(self._heads(self.k_proj(both)))
        value = self._heads(self.v_proj(both))
        rows = slice(len(context), None)
        query, _ = apply_rotary_pos_emb(query, query, cos[rows], sin[rows])
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        key, value = (x.repeat_interleave(self.share, dim=1) for x in (key, value))
        return self.o_proj(self.attend(query, key, value, mask).flatten(1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """query [n*k, a, d], key and value [s + n*k, a, d] -> [n*k, a, d]."""
        scores = torch.einsum("qad,lad->aql", query, key) / math.sqrt(self.head_dim)
        scores = scores.float().masked_fill(~mask, -torch.inf)
        if self.attention_sink_bias is not None:
            sink = self.attention_sink_bias[:, None, None].expand(-1, len(mask), 1)
            scores = torch.cat([scores, sink], dim=-1)
        probs = scores.softmax(dim=-1).to(value.dtype)[..., : len(value)]
        return torch.einsum("aql,lad->qad", probs, value)

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim))


class PlainLayer(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.self_attn = PlainAttention(shape)
        self.mlp = Qwen3MLP(qwen3_config(shape))
        self.input_layernorm = Qwen3RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self, hidden: Tensor, context: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), context, mask, rope)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PlainMarkovHead(nn.Module):
    """W1 and W2 and, for gated and rnn heads, the projection of their latent."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        h, r = shape.hidden_size, shape.markov_rank
        self.kind = shape.markov_head_type
        self.markov_w1 = nn.Embedding(shape.vocab_size, r)
        self.markov_w2 = nn.Linear(r, shape.vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(h + r, r)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(h + 2 * r, 3 * r)

    def latents(self, prev_token_ids: Tensor, hidden: Tensor) -> Tensor:
        """[n, k], [n, k, h] -> z [n, k, r] of the bias W2 z."""
        e = self.markov_w1(prev_token_ids)
        if self.kind == "vanilla":
            return e
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden, e], dim=-1))) * e
        state, out = torch.zeros_like(e[:, 0]), []
        for k in range(e.shape[1]):
            joint = self.joint_proj(torch.cat([state, e[:, k], hidden[:, k]], dim=-1))
            gate, candidate, output = joint.chunk(3, dim=-1)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * candidate.tanh()
            out.append(output.tanh())
        return torch.stack(out, dim=1)


class PlainConfidenceHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)


class PlainDraft(nn.Module):
    """The draft of one sample, with Hugging Face / DeepSpec parameter names."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.shape = shape
        h = shape.hidden_size
        self.embed_tokens = nn.Embedding(shape.vocab_size, h)
        self.fc = nn.Linear(len(shape.target_layer_ids) * h, h, bias=False)
        self.hidden_norm = Qwen3RMSNorm(h, shape.rms_norm_eps)
        self.layers = nn.ModuleList(PlainLayer(shape) for _ in range(shape.num_layers))
        self.norm = Qwen3RMSNorm(h, shape.rms_norm_eps)
        self.lm_head = nn.Linear(h, shape.vocab_size, bias=False)
        if shape.markov_rank:
            self.markov_head = PlainMarkovHead(shape)
        if shape.enable_confidence_head:
            extra = shape.markov_rank if shape.confidence_head_with_markov else 0
            self.confidence_head = PlainConfidenceHead(h + extra)
        for frozen in (self.embed_tokens, self.lm_head):
            frozen.requires_grad_(False)
        # Outside the module tree: a cast of the draft must not round the frequencies.
        self.rotary = (plain_rotary(shape),)

    def backbone(self, taps: Tensor, input_ids: Tensor, anchors: Tensor) -> Tensor:
        """taps [s, m*h], input_ids [s], anchors [n] -> [n, k, h] after the final norm."""
        s, n, k = len(input_ids), len(anchors), self.shape.block_size
        context = self.hidden_norm(self.fc(taps))  # [s, h]
        ids = torch.full((n, k), self.shape.mask_token_id)
        ids[:, 0] = input_ids[anchors]
        hidden = self.embed_tokens(ids.flatten())  # [n*k, h]
        block_positions = anchors[:, None] + torch.arange(k)
        positions = torch.cat([torch.arange(s), block_positions.flatten()])
        cos, sin = self.rotary[0](hidden, positions[None])
        rules = [self.shape.attention.of_layer(i) for i in range(len(self.layers))]
        masks = {rule: context_mask(anchors, s, k, rule) for rule in dict.fromkeys(rules)}
        for rule, layer in zip(rules, self.layers, strict=True):
            hidden = layer(hidden, context, masks[rule], (cos[0], sin[0]))
        return self.norm(hidden).view(n, k, -1)

    def forward(self, taps: Tensor, input_ids: Tensor, anchors: Tensor) -> PlainOutput:
        """taps [s, m*h], input_ids [s], anchors [n]; the blocks follow input_ids (0 past the
        end)."""
        hidden = self.backbone(taps, input_ids, anchors)
        everywhere = torch.ones_like(input_ids)
        from_anchor = self.shape.sample_from_anchor
        prev = plain_blocks(
            input_ids,
            everywhere,
            anchors,
            self.shape.block_size,
            sample_from_anchor=from_anchor,
        ).prev_token_ids
        transform = self.shape.logit_scale, self.shape.logit_softcapping
        logits = plain_transform(self.lm_head(hidden), *transform)
        if self.shape.markov_rank:
            first = 0 if from_anchor else 1  # where the recurrence of the rnn head starts
            latents = self.markov_head.latents(prev[:, first:], hidden[:, first:])
            bias = self.markov_head.markov_w2(latents)
            logits = torch.cat([logits[:, :first], logits[:, first:] + bias], dim=1)
        confidence_logits = None
        if self.shape.enable_confidence_head:
            features = [hidden]
            if self.shape.confidence_head_with_markov:
                features.append(self.markov_head.markov_w1(prev))
            confidence_logits = self.confidence_head.proj(torch.cat(features, dim=-1)).squeeze(-1)
        return PlainOutput(logits, confidence_logits, hidden)


def plain_loss(
    logits: Tensor,
    target_logits: Tensor,
    labels: Tensor,
    eval_mask: Tensor,
    confidence_logits: Tensor | None,
    gamma: float | None,
    alphas: tuple[float, float, float],
    sample_from_anchor: bool = True,
    weighting: LossWeighting = DECAY,
    confidence_weights: str = "decay",
) -> dict[str, Tensor]:
    """Weighted sums over all slots and their weight. logits, target_logits [n, k, v]; labels,
    eval_mask, confidence_logits [n, k]; alphas of CE, L1 and confidence. `loss_sum` is the
    weighted sum of the three terms; the loss of a step is loss_sum / weight. `accept_rate` is
    [n, k], detached. The sums of the single terms have the fixed weights always."""
    k = labels.shape[1]
    slots = torch.arange(k, dtype=torch.float32)
    if not sample_from_anchor:
        slots = slots - 1  # slot 0 is never in the mask
    decay = torch.ones(k) if gamma is None else torch.exp(-slots / gamma)
    weights = eval_mask * decay
    ce = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    ce = ce.view_as(weights)
    p, q = logits.float().softmax(dim=-1), target_logits.float().softmax(dim=-1)
    l1 = (p - q).abs().sum(dim=-1)
    accept_rate = (1 - l1 / 2).clamp(0, 1).detach()
    confidence = torch.zeros_like(ce)
    if confidence_logits is not None:
        confidence = F.binary_cross_entropy_with_logits(
            confidence_logits.float(), accept_rate, reduction="none"
        )
    sums = {
        "ce_sum": (weights * ce).sum(),
        "l1_sum": (weights * l1).sum(),
        "confidence_sum": (weights * confidence).sum(),
    }
    trained, of_confidence = weights, weights
    if weighting.name != "decay":
        likely = (-ce).exp() if weighting.name == "dpace" else accept_rate
        chances = (1 - weighting.alpha) * likely.detach() + weighting.alpha
        trained = plain_acceptance_weights(chances, eval_mask)
    if confidence_weights == "reach":
        of_confidence = plain_reach(accept_rate, eval_mask)
    loss_sum = (trained * (alphas[0] * ce + alphas[1] * l1)).sum()
    loss_sum = loss_sum + alphas[2] * (of_confidence * confidence).sum()
    return {**sums, "loss_sum": loss_sum, "weight": weights.sum(), "accept_rate": accept_rate}


def plain_acceptance_weights(chances: Tensor, eval_mask: Tensor) -> Tensor:
    """Of each slot the sum, over the supervised slots from it on, of the products of all chances up
    to them; 0 for a slot that is not supervised. [n, k], [n, k] -> [n, k]."""
    weights = torch.zeros_like(chances)
    for i, row in enumerate(eval_mask.tolist()):
        supervised = [j for j, is_on in enumerate(row) if is_on]
        for j in supervised:
            for last in (m for m in supervised if m >= j):
                product = 1.0
                for m in (m for m in supervised if m <= last):
                    product *= chances[i, m].item()
                weights[i, j] += product
    return weights


def plain_reach(chances: Tensor, eval_mask: Tensor) -> Tensor:
    """Of each supervised slot the product of the chances of those before it. [n, k] -> [n, k]."""
    weights = torch.zeros_like(chances)
    for i, row in enumerate(eval_mask.tolist()):
        product = 1.0
        for j in (j for j, is_on in enumerate(row) if is_on):
            weights[i, j] = product
            product *= chances[i, j].item()
    return weights


def plain_transform(logits: Tensor, scale: float, softcapping: float | None) -> Tensor:
    """A scale, then a soft cap."""
    if scale != 1:
        logits = logits * scale
    return logits if softcapping is None else softcapping * torch.tanh(logits / softcapping)


def precise(logits: Tensor) -> Tensor:
    """fp32, or float64 where it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def plain_head_loss(
    hidden: Tensor,
    latent: Tensor | None,
    target_hidden: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lm_head: Tensor,
    markov_w2: Tensor | None,
    *,
    terms: dict[str, float],
    labels_from_target: bool = False,
    draft_transform: tuple[float, float | None] = (1.0, None),
    target_transform: tuple[float, float | None] = (1.0, None),
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ops.head_loss.head_loss` on whole, unpadded matrices [v, h] and [v, r], by autograd.
    terms: weights by name. Returns the weighted loss [], and of each row [n] CE, with a target raw
    L1, and the other terms that weigh anything. Transforms: scale and soft cap, of draft and
    target."""
    logits = plain_transform(hidden @ lm_head.t(), *draft_transform)
    if latent is not None:
        logits = logits + latent @ markov_w2.t()
    logits, used = precise(logits), {name for name, weight in terms.items() if weight > 0}
    known = {}
    if target_hidden is not None:
        target_logits = precise(plain_transform(target_hidden @ lm_head.t(), *target_transform))
        known = plain_distances(logits, target_logits, used | {"l1"})
        if labels_from_target:
            labels = target_logits.argmax(dim=-1)
    known["ce"] = F.cross_entropy(logits, labels, reduction="none")
    loss = sum((terms[name] * known[name] for name in used), torch.zeros_like(weights))
    return (weights * loss).sum(), known


def plain_distances(logits: Tensor, target_logits: Tensor, names: set[str]) -> dict[str, Tensor]:
    """Those that are named, of each row."""
    log_p, log_q = (x.log_softmax(dim=-1) for x in (logits, target_logits))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return F.kl_div(other, one, log_target=True, reduction="none").sum(dim=-1)

    def l1() -> Tensor:
        return (log_p.exp() - log_q.exp()).abs().sum(dim=-1)

    def shared() -> Tensor:
        return torch.minimum(log_p.exp(), log_q.exp()).sum(dim=-1)  # 1 - L1 / 2, exact if small

    def lk_hybrid() -> Tensor:
        mixing = torch.exp(-3 * (1 - l1() / 2)).detach()
        return mixing * kl(log_q, log_p) + (1 - mixing) * l1() / 2

    formulas = {
        "l1": l1,
        "kl": lambda: kl(log_q, log_p),
        "reverse_kl": lambda: kl(log_p, log_q),
        "js": lambda: (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
        "renyi_half": lambda: -2 * ((log_p + log_q) / 2).logsumexp(dim=-1),
        "lk_alpha": lambda: -shared().clamp(min=1e-5).log(),
        "lk_hybrid": lk_hybrid,
    }
    return {name: formula() for name, formula in formulas.items() if name in names}


def plain_tau(accept_rate: Tensor, eval_mask: Tensor) -> Tensor:
    """Expected tokens of each round, bonus token included. [n, k], [n, k] -> [n]."""
    out = []
    for rates, mask in zip(accept_rate.tolist(), eval_mask.tolist(), strict=True):
        total, survival = 1.0, 1.0
        for rate, supervised in zip(rates, mask, strict=True):
            survival *= rate if supervised else 0.0
            total += survival
        out.append(total)
    return torch.tensor(out, dtype=accept_rate.dtype)
