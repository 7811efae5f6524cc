"""A draft whose RoPE turns a part of each head equals its plain twin in loss and every gradient,
and drafts as it was trained."""

from dataclasses import replace

import pytest
import torch

from support.draft_folders import ROPES
from support.draft_passes import drafted_and_trained
from support.draft_steps import assert_plain_step, step_gradients
from support.shapes import SHAPE

SHAPES = {
    kind: replace(SHAPE, rope_parameters={**ROPES[kind], "partial_rotary_factor": 0.5})
    for kind in ("default", "yarn")
}
SHAPES["yarn of the whole head"] = replace(SHAPE, rope_parameters=ROPES["yarn"])


@pytest.mark.parametrize("tp, split", [(1, False), (2, True)])
@pytest.mark.parametrize("name", SHAPES)
def test_step_equals_the_plain_twin(pool, name, tp, split):
    options = dict(micro_batch_size=2, sequence_parallel=split)
    ranks = pool.run(step_gradients, world=tp, tp=tp, shape=SHAPES[name], **options)
    assert_plain_step(ranks, SHAPES[name])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_decoding_are_those_of_training(pool, name, tp):
    for found, wanted, _ in pool.run(drafted_and_trained, world=tp, tp=tp, shape=SHAPES[name]):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
