"""A Gemma-4 draft equals its plain twin in loss and every gradient, also where ranks share its one
key/value head; its checkpoints move between layouts, and it drafts as it was trained."""

from dataclasses import replace

import pytest

from dspark_megatron.shape.attention import DraftAttention
from support.draft_steps import assert_plain_step, step_gradients
from support.shapes import GEMMA4

SHAPES = {
    "shared keys": GEMMA4,
    "own values": replace(GEMMA4, shared_key_value=False, num_key_value_heads=4),
    "two heads, no cap": replace(GEMMA4, num_key_value_heads=2, logit_softcapping=None),
    "window, sink, biases": replace(
        GEMMA4,
        attention=DraftAttention(
            window=4, sliding_layers=(1,), causal_layers=(1,), sink=True, biases=True
        ),
    ),
}
LAYOUTS = [
    (1, 1, 4, False, False),
    (2, 2, 1, False, True),
    (2, 2, 4, True, False),
    (4, 4, 2, True, True),
    (4, 4, 1, False, False),
    (4, 2, 1, True, True),
]
"""World size, tensor-parallel size, micro-batch size, sequence parallelism, recompute."""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world, tp, size, split, recompute", LAYOUTS)
def test_step_equals_the_plain_twin(pool, name, world, tp, size, split, recompute):
    options = dict(sequence_parallel=split, recompute_activations=recompute)
    arguments = dict(shape=SHAPES[name], micro_batch_size=size, **options)
    assert_plain_step(pool.run(step_gradients, world=world, tp=tp, **arguments), SHAPES[name])
