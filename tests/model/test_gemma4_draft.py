"""A Gemma-4 draft equals its plain twin in loss and every gradient, also where ranks share its one
key/value head; its checkpoints move between layouts, and it drafts as it was trained."""

from dataclasses import replace

import pytest
import torch

from dspark_megatron.conversion.layouts.names import check_megatron_tensors
from dspark_megatron.model.draft_model import FROZEN_REPLICAS
from dspark_megatron.shape.attention import DraftAttention
from dspark_megatron.storage.training_checkpoint import CheckpointReader
from support.draft_passes import drafted_and_trained
from support.draft_steps import assert_plain_step, step_gradients, whole
from support.shapes import GEMMA4, SHAPE, meta_of
from support.tiny_draft import assemble, build_tiny_draft, layout_of

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


ONE_HEAD = {n: replace(SHAPE, num_key_value_heads=n, head_dim=16) for n in (1, 2)}


@pytest.mark.parametrize("heads", ONE_HEAD)
@pytest.mark.parametrize("split", [False, True])
def test_ranks_share_key_value_heads_of_any_draft(pool, heads, split):
    """With keys and values apart."""
    arguments = dict(shape=ONE_HEAD[heads], micro_batch_size=2, sequence_parallel=split)
    assert_plain_step(pool.run(step_gradients, world=4, tp=4, **arguments), ONE_HEAD[heads])


def saved(runtime, shape, folder, loads):
    """This rank's part of a checkpoint, and what is read back of one of another layout."""
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from dspark_megatron.run.checkpoints.saving import save_checkpoint
    from dspark_megatron.run.checkpoints.state import RunState

    draft = build_tiny_draft(runtime, shape)
    if loads:
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.zero_()
        load_checkpoint(folder / "iter_0000001", draft, None)
    else:
        save_checkpoint(folder, RunState(1, 0), meta_of(shape), draft, None, keep_last=1)
    own = {n: p.detach() for n, p in draft.named_parameters() if not n.startswith(FROZEN_REPLICAS)}
    return own, {**layout_of(draft), **{n: (None, 1) for n in own if "scalar" in n}}


def assembled(pool, tp, **arguments):
    ranks = pool.run(saved, world=tp, tp=tp, **arguments)
    return assemble([own for own, _ in ranks], ranks[0][1])


@pytest.mark.parametrize("name", ["shared keys", "own values"])
def test_a_checkpoint_loads_where_more_ranks_share_a_head(pool, tmp_path, name):
    shape = replace(SHAPES[name], num_key_value_heads=1)
    written = assembled(pool, 2, shape=shape, folder=tmp_path, loads=False)
    check_megatron_tensors(shape, {n: tuple(x.shape) for n, x in written.items()}, "here")
    read = assembled(pool, 4, shape=shape, folder=tmp_path, loads=True)
    for key, tensor in written.items():
        rows = min(len(tensor), len(read[key]))  # the vocabulary is padded otherwise
        assert torch.equal(read[key][:rows], tensor[:rows]), key
    exported = CheckpointReader(tmp_path / "iter_0000001")
    assert exported.tensor("layers.0.layer_scalar.value") != 1


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tp", [1, 4])
def test_drafts_come_from_the_trained_logits(pool, name, tp):
    for drafted, trained, _ in pool.run(drafted_and_trained, world=tp, tp=tp, shape=SHAPES[name]):
        torch.testing.assert_close(drafted, trained, rtol=1e-4, atol=1e-5)


def test_bfloat16_follows_float32(pool):
    arguments = dict(world=4, tp=4, shape=GEMMA4, micro_batch_size=1)
    exact = pool.run(step_gradients, **arguments)
    rounded = pool.run(step_gradients, dtype="bfloat16", **arguments)
    assert rounded[0]["metrics"]["loss"] == pytest.approx(exact[0]["metrics"]["loss"], rel=0.02)
    for name, expected in whole(exact, "grads", GEMMA4).items():
        error = (whole(rounded, "grads", GEMMA4)[name] - expected).norm() / expected.norm()
        assert error < 0.15, f"{name}: {error:.3f}"
