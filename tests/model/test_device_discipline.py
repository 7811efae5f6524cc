"""No host tensor slips into the training step and nothing in it waits for the device: the real step
on the meta device, for the first of 1, 2 and 8 tensor-parallel ranks."""

from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.config.objective.terms import TERMS, LossTerms, LossWeighting
from dspark_megatron.shape.attention import DraftAttention
from support.meta_step import META, step_on_meta
from support.shapes import BEHIND_ANCHOR, SHAPES

TENSOR_PARALLEL = 1, 2, 8
DRAFTS = SHAPES | {"slot 0 drafts nothing": BEHIND_ANCHOR["rnn"]}
HEADS = {name: replace(shape, num_key_value_heads=8) for name, shape in DRAFTS.items()}
SHAPE = HEADS["vanilla"]
MICRO_BATCHES = 2


def check(shape=SHAPE, tp=2, **options):
    """Every trained parameter gets a gradient from each micro-batch, and a step takes one transfer
    for each of them and one for their divisors."""
    model, gradients, discipline = step_on_meta(shape, tp, **options)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(gradients) == set(trained)
    for name, found in gradients.items():
        assert len(found) in (MICRO_BATCHES, 2 * MICRO_BATCHES), name  # twice where recomputed
        assert all((g.device, g.shape) == (META, trained[name].shape) for g in found), name
    assert discipline.transfers == MICRO_BATCHES + 1


LAYOUTS = [
    (tp, split) for tp, split in product(TENSOR_PARALLEL, (False, True)) if tp > 1 or not split
]


@pytest.mark.parametrize(("tp", "sequence_parallel"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_stays_on_the_device(tp, sequence_parallel, dtype):
    check(tp=tp, sequence_parallel=sequence_parallel, dtype=dtype)


@pytest.mark.parametrize("name", HEADS)
def test_with_each_head(name):
    loss = LossConfig(chunk_rows=8)
    if not HEADS[name].enable_confidence_head:
        loss = replace(loss, confidence_head_alpha=0.0)
    check(HEADS[name], loss=loss)


@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_with_windows_sinks_and_biases(layers):
    attention = DraftAttention(
        window=4, sliding_layers=layers, causal_layers=layers, sink=True, biases=True
    )
    check(replace(SHAPE, attention=attention), sequence_parallel=True)


def test_with_scaled_and_capped_logits():
    check(replace(SHAPE, logit_scale=0.5, logit_softcapping=30.0))


@pytest.mark.parametrize("recompute", [False, True])
def test_with_recomputed_layers_under_sequence_parallelism(recompute):
    check(recompute_activations=recompute, sequence_parallel=True)


@pytest.mark.parametrize(
    "loss",
    [
        {"terms": LossTerms(**dict.fromkeys(TERMS, 0.2))},
        {"ce_labels": "target_argmax"},
        {"normalization": "deepspec"},
        {"normalization": "local_count"},
        {"weighting": LossWeighting(name="dpace"), "confidence_stop_gradient": True},
        {
            "weighting": LossWeighting(name="dpard"),
            "confidence_weights": "reach",
            "normalization": "global_samples",
        },
    ],
    ids=["all terms", "target's labels", "deepspec", "local_count", "dpace", "dpard"],
)
@pytest.mark.parametrize("tp", TENSOR_PARALLEL)
def test_with_other_objectives(tp, loss):
    check(tp=tp, loss=LossConfig(chunk_rows=8, **loss))


def test_a_host_tensor_in_the_step_is_found():
    from dspark_megatron.data.batch import MicroBatch

    def left_on_the_host(self, device):
        moved = move(self, device)
        return replace(moved, blocks=replace(moved.blocks, weights=self.blocks.weights))

    move = MicroBatch.to
    with (
        mock.patch.object(MicroBatch, "to", left_on_the_host),
        pytest.raises((AssertionError, RuntimeError), match="host and device|expected device meta"),
    ):
        check()


def test_a_wait_for_the_device_is_found():
    from dspark_megatron.training import forward_step

    def waits(rates, mask):
        return rates.new_tensor(rates.sum().item())

    with mock.patch.object(forward_step, "tau", waits), pytest.raises(RuntimeError, match="item"):
        check()
