"""The floating-point operations of a model's step by formula: what the work needs, whatever the
backend, padding and recomputation make of it."""

import math
from dataclasses import dataclass

from dspark_megatron.conversion.layouts.names import hugging_face_shapes
from dspark_megatron.data.blocks import DraftBlocks
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.check import RunPlan
from dspark_megatron.shape import DraftShape
from dspark_megatron.targets.huggingface.split import meta_target, weights_per_token


@dataclass(frozen=True)
class DraftFlops:
    """Of draft and loss, forward and backward, of all tensor-parallel ranks together.

    A matrix of w weights takes 2 w a row, and as much again for the gradient of its input and for
    its own. With t context tokens, n blocks of k slots of which d draft, and r supervised slots:

        4 t fc + 6 t kv + 6 n k layers + 6 n d heads
        + r v (6 rank + 4 h, and 2 h with the target's logits)
        + 12 a (sum over blocks of k (context + k)) for each layer, a the width of all heads

    `fc` has no gradient of its input; the LM head has none of its own. A window is counted as that
    of the layer that sees most.
    """

    fc: int
    context: int
    slot: int
    heads: int
    supervised: int
    pair: int
    block_size: int

    @classmethod
    def of(cls, shape: DraftShape, *, with_target: bool) -> "DraftFlops":
        shapes = hugging_face_shapes(shape, shared_weights=False)
        weights = {name: math.prod(size) for name, size in shapes.items() if len(size) > 1}
        layers = {name: n for name, n in weights.items() if name.startswith("layers.")}
        others = {name: n for name, n in weights.items() if name not in layers}
        projected = [n for name, n in layers.items() if "k_proj" in name or "v_proj" in name]
        heads = [n for name, n in others.items() if "markov_w" not in name and "proj" in name]
        of_vocabulary = 6 * shape.markov_rank + (6 if with_target else 4) * shape.hidden_size
        return cls(
            fc=4 * others["fc.weight"],
            context=6 * sum(projected),
            slot=6 * sum(layers.values()),
            heads=6 * sum(heads),
            supervised=shape.vocab_size * of_vocabulary,
            pair=12 * shape.num_layers * shape.num_attention_heads * shape.head_dim,
            block_size=shape.block_size,
        )

    def micro_batch(self, blocks: DraftBlocks) -> float:
        """Of its pass. On the host, from what the host knows."""
        n, drafted = blocks.eval_mask.shape
        seen = sum(end - start for start, end in blocks.bounds_on_host)
        return float(
            len(blocks.context_positions) * (self.fc + self.context)
            + n * self.block_size * self.slot
            + n * drafted * self.heads
            + len(blocks.labels) * self.supervised
            + self.block_size * (seen + n * self.block_size) * self.pair
        )


def target_flops(plan: RunPlan) -> float | None:
    """Of the target's pass over a token: 2 for each weight that takes part, without attention's
    scores. 0 where no target runs; None of a family that Transformers cannot build."""
    if plan.config.target.is_stored:
        return 0.0
    all_layers = plan.config.needs_target_logits
    last = None if all_layers else max(plan.shape.target_layer_ids)
    try:
        model = meta_target(plan.target_config, plan.target_dtype)
    except ConfigError:
        return None
    return 2.0 * weights_per_token(model, last)
