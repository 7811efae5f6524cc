"""Recomputing activations changes what is kept, and no gradient."""

from unittest import mock

import pytest
import torch

from support.shapes import SHAPE
from support.tiny_draft import build_tiny_draft, make_samples, make_step, rank_micro_batches


class Counted:
    """How often a draft's layers attend, and the bytes saved for backward while it is entered."""

    def __init__(self, model):
        self.attended, self.saved_bytes = 0, 0
        for layer in model.layers:
            layer.self_attention.register_forward_hook(self._count)

    def _count(self, *_):
        self.attended += 1

    def _pack(self, tensor):
        self.saved_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def saving(self):
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)


def gradients(runtime, recompute):
    """One step: every gradient as the optimizer gets it, and how often the layers attended."""
    from dspark_megatron.training.metrics import MetricSums

    model = build_tiny_draft(runtime, SHAPE, recompute_activations=recompute)
    counted, samples = Counted(model), make_samples(SHAPE)
    step = make_step(runtime, model, samples)
    batches = rank_micro_batches(runtime, samples, SHAPE.num_draft_tokens, 2)
    step.run(batches, MetricSums.zeros(SHAPE.num_draft_tokens, runtime.device))
    grads = {n: p.main_grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return grads, counted.attended / len(batches)


@pytest.mark.parametrize("world, tp", [(1, 1), (2, 2), (2, 1)])
def test_gradients_are_the_same_and_layers_run_twice(pool, world, tp):
    kept = pool.run(gradients, world=world, tp=tp, recompute=False)
    again = pool.run(gradients, world=world, tp=tp, recompute=True)
    for (expected, once), (grads, twice) in zip(kept, again, strict=True):
        assert (once, twice) == (SHAPE.num_layers, 2 * SHAPE.num_layers)
        assert set(grads) == set(expected) and all(g.any() for g in expected.values())
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=5e-8)


def one_pass(runtime, recompute, with_grad):
    """Hidden states, bytes saved for backward, and how many layers went through a checkpoint."""
    from dspark_megatron.data.blocks import draft_blocks
    from dspark_megatron.model.layers import qwen3

    checkpoint = mock.patch.object(qwen3, "checkpoint", wraps=qwen3.checkpoint)
    model = build_tiny_draft(runtime, SHAPE, recompute_activations=recompute)
    counted, samples = Counted(model), make_samples(SHAPE, lengths=(20,))
    ids, anchors = samples.input_ids[0], torch.arange(19)
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    blocks = draft_blocks(ids[None], mask, [anchors], SHAPE.num_draft_tokens).to(runtime.device)
    with torch.set_grad_enabled(with_grad), counted.saving(), checkpoint as checkpointed:
        output = model(samples.taps[0][None], blocks)
    return output.hidden.detach(), counted.saved_bytes, checkpointed.call_count


def test_only_inputs_of_layers_are_kept(pool):
    [kept] = pool.run(one_pass, world=1, tp=1, recompute=False, with_grad=True)
    [again] = pool.run(one_pass, world=1, tp=1, recompute=True, with_grad=True)
    assert torch.equal(kept[0], again[0])
    assert (kept[2], again[2]) == (0, SHAPE.num_layers)
    assert again[1] < kept[1] / 2, "saved for backward, layers and all around them"


def test_without_gradients_nothing_is_kept(pool):
    [expected] = pool.run(one_pass, world=1, tp=1, recompute=False, with_grad=True)
    [got] = pool.run(one_pass, world=1, tp=1, recompute=True, with_grad=False)
    assert torch.equal(got[0], expected[0])
    assert got[1:] == (0, 0)
