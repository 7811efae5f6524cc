"""The floating-point operations that a step of a run needs, by formula.

They are those of its matrix products, forward and backward, whatever a backend, padding and
recomputation make of them: a kernel of attention does not show its products to a counter.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark_megatron.config.attention import LayerAttention
from dspark_megatron.conversion.layouts.names import hugging_face_shapes
from dspark_megatron.data.batch import MicroBatch
from dspark_megatron.data.blocks import DraftBlocks
from dspark_megatron.ops.attention.visible import first_seen, own_seen
from dspark_megatron.run.check import RunPlan
from dspark_megatron.shape import DraftShape
from dspark_megatron.training.forward_step import ForwardStep
from dspark_megatron.training.watching.target_flops import TargetFlops


@dataclass(frozen=True)
class StepFlops:
    """Of draft, head loss and target, of all ranks that share them together."""

    draft: "DraftFlops"
    target: TargetFlops | None
    """None where no target runs."""

    @classmethod
    def of(cls, plan: RunPlan) -> "StepFlops | None":
        """None where the target's family cannot be counted."""
        config = plan.config
        draft = DraftFlops.of(plan.shape, with_target=config.needs_target_logits)
        if config.target.is_stored:
            return cls(draft, None)
        last = None if config.needs_target_logits else max(plan.shape.target_layer_ids)
        target = TargetFlops.of(plan.target_config, last)
        return None if target is None else cls(draft, target)

    def of_step(self, batches: Sequence[MicroBatch], forward_step: ForwardStep) -> float:
        """Of this data-parallel rank's micro-batches. Known on the host."""
        total = sum(self.draft.of_blocks(x.blocks) for x in batches if forward_step.learns(x))
        if self.target is not None:
            total += sum(self.target.of_lengths(x.lengths) for x in forward_step.asked_for(batches))
        return float(total)


@dataclass(frozen=True)
class DraftFlops:
    """Of draft and head loss, forward and backward.

    A matrix of w weights takes 2 w a row, and as much again for the gradient of its input and for
    its own. With t context tokens, n blocks of k slots of which d draft, and r supervised slots:

        4 t fc + 6 t kv + 6 n k layers + 6 n d heads
        + r v (6 rank + 4 h, and 2 h with the target's logits)
        + 12 a (pairs of a slot and what it sees), for each layer; a: width of all query heads

    `fc` has no gradient of its input; the LM head has none of its own. The confidence head is
    counted with all its gradients, also where the config stops some of them.
    """

    fc: int
    context: int
    slot: int
    heads: int
    supervised: int
    pair: int
    block_size: int
    rules: dict[LayerAttention, int]
    """What slots see, with the number of layers that have this rule."""

    @classmethod
    def of(cls, shape: DraftShape, *, with_target: bool) -> "DraftFlops":
        shapes = hugging_face_shapes(shape, shared_weights=False)
        weights = {name: math.prod(size) for name, size in shapes.items() if len(size) > 1}
        layers = {name: n for name, n in weights.items() if name.startswith("layers.")}
        projected = [n for name, n in layers.items() if "k_proj" in name or "v_proj" in name]
        heads = ("markov_head.gate_proj", "markov_head.joint_proj", "confidence_head.proj")
        of_vocabulary = 6 * shape.markov_rank + (6 if with_target else 4) * shape.hidden_size
        return cls(
            fc=4 * weights["fc.weight"],
            context=6 * sum(projected),
            slot=6 * sum(layers.values()),
            heads=6 * sum(n for name, n in weights.items() if name.startswith(heads)),
            supervised=shape.vocab_size * of_vocabulary,
            pair=12 * shape.num_attention_heads * shape.head_dim,
            block_size=shape.block_size,
            rules=Counter(shape.attention.of_layer(i) for i in range(shape.num_layers)),
        )

    def of_blocks(self, blocks: DraftBlocks) -> int:
        """Of a micro-batch, which is still on the host."""
        n, drafted = blocks.eval_mask.shape
        k = self.block_size
        pairs = sum(count * pairs_seen(blocks, k, rule) for rule, count in self.rules.items())
        return (
            len(blocks.context_positions) * (self.fc + self.context)
            + n * k * self.slot
            + n * drafted * self.heads
            + len(blocks.labels) * self.supervised
            + pairs * self.pair
        )


def pairs_seen(blocks: DraftBlocks, slots: int, rule: LayerAttention) -> int:
    """Pairs of a slot and a context token, or slot of its block, that it sees."""
    bounds = blocks.context_bounds
    starts = first_seen(bounds[:, None], torch.arange(slots), rule)  # [n, k] or [n, 1]
    context = (bounds[:, 1:] - starts).expand(-1, slots).sum()
    own = len(bounds) * own_seen(slots, rule, bounds.device).sum()
    return int(context + own)
