"""Gradients that are reduced while the backward pass goes on are those reduced after it; and what
else lets a GPU work and communicate at a time."""

import os
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dspark_megatron.config import LossConfig, OptimizerConfig
from dspark_megatron.errors import ConfigError
from support.shapes import SHAPE
from support.tiny_draft import CachedStates, build_tiny_draft, make_samples, rank_micro_batches
from support.tiny_target import tiny_config


class AnnouncedStates(CachedStates):
    """Of a target that runs a step's micro-batches together, all of them and in the order of the
    passes, which differs between ranks."""

    lockstep = True

    def expect(self, batches):
        self.expected = list(batches)

    def states(self, batch):
        assert torch.equal(self.expected.pop(0).input_ids, batch.input_ids)
        return super().states(batch)


def steps(runtime, overlap, idle=None, distributed=False, recompute=False):
    """Gradients of three steps over the same samples, in the last of which nothing is learnt from
    the micro-batches `idle`, by data-parallel rank; and how many buckets were under way when each
    backward ended."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from dspark_megatron.mcore import optimizer
    from dspark_megatron.training import step
    from dspark_megatron.training.metrics import MetricSums

    model = build_tiny_draft(runtime, SHAPE, recompute_activations=recompute)
    settings = OptimizerConfig(overlap_grad_reduce=overlap, use_distributed_optimizer=distributed)
    small = partial(DistributedDataParallelConfig, bucket_size=3000)
    with mock.patch.object(optimizer, "DistributedDataParallelConfig", small):
        wrapped = optimizer.wrap_data_parallel(model, settings)
    samples = make_samples(SHAPE)
    place = dict(tp_group=runtime.tp_group, dp_group=runtime.dp_group, device=runtime.device)
    gradient_step = step.GradientStep(
        LossConfig(chunk_rows=4), wrapped, AnnouncedStates(samples), **place
    )
    batches = rank_micro_batches(runtime, samples, SHAPE.num_draft_tokens, 1)
    gradients, under_way = [], []
    start = step.GradientStep._start_reductions

    def count_and_start(self):
        under_way.append(sum(g.grad_reduce_handle is not None for g in wrapped.bucket_groups))
        start(self)

    with mock.patch.object(step.GradientStep, "_start_reductions", count_and_start):
        for number in range(3):
            if number == 2:
                for i in (idle or {}).get(runtime.dp_group.rank(), []):
                    batches[i] = replace(batches[i], blocks=batches[i].blocks.part(slice(0)))
            gradient_step.run(batches, MetricSums.zeros(SHAPE.num_draft_tokens, runtime.device))
            assert not gradient_step.forward_step.target.expected
            gradients.append(reduced(wrapped))
    return gradients, under_way, len(wrapped.bucket_groups)


def reduced(wrapped):
    """The reduced gradients. With a sharded optimizer a rank has its shard of each bucket alone:
    they are put together."""
    if wrapped.ddp_config.use_distributed_optimizer:
        group = wrapped.dp_cp_group
        for bucket in (bucket for g in wrapped.bucket_groups for bucket in g.buckets):
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    return {n: p.main_grad.clone() for n, p in wrapped.named_parameters() if p.requires_grad}


def assert_same(gradients, expected):
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("world, tp", [(2, 1), (4, 2)])
def test_gradients_are_the_same(pool, world, tp, distributed, recompute):
    """A bucket goes out once all uses of its weights have given their gradient: with recompute
    some weights get two, one inside and one outside of the checkpoint."""
    arguments = dict(world=world, tp=tp, distributed=distributed, recompute=recompute)
    expected = pool.run(steps, overlap=False, **arguments)
    got = pool.run(steps, overlap=True, **arguments)
    for (grads, under_way, buckets), (wanted, none, _) in zip(got, expected, strict=True):
        assert buckets > 3 and none == [0, 0, 0]
        # Megatron learns in the first step how many gradients each weight gets.
        assert under_way == [0, buckets, buckets]
        for mine, theirs in zip(grads, wanted, strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("micro_batches, overlaps", [([1], True), ([0, 1], False)])
def test_a_rank_that_has_less_to_learn(pool, micro_batches, overlaps):
    """In its last micro-batch or in none: in the other it learns while it reduces."""
    arguments = dict(world=2, tp=1, idle={1: micro_batches})
    expected = pool.run(steps, overlap=False, **arguments)
    got = pool.run(steps, overlap=True, **arguments)
    for (grads, under_way, buckets), (wanted, _, _) in zip(got, expected, strict=True):
        assert under_way == [0, buckets, buckets if overlaps else 0]
        assert_same(grads[2], wanted[2])


def test_every_weight_must_get_a_gradient(tiny_run):
    """Megatron waits for all of a bucket."""
    overlap = {"overlap_grad_reduce": True}
    with pytest.raises(ConfigError, match="confidence_head_alpha is 0.*enable_confidence_head"):
        tiny_config(tiny_run, optimizer=overlap, loss={"confidence_head_alpha": 0.0})
    no_head = {"enable_confidence_head": False, "confidence_head_with_markov": False}
    tiny_config(tiny_run, optimizer=overlap, loss={"confidence_head_alpha": 0.0}, model=no_head)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, Apex may be there")
def test_fused_accumulation_needs_a_gpu(tiny_run):
    from dspark_megatron.run.check import check

    fused = {"gradient_accumulation_fusion": True}
    with pytest.raises(ConfigError, match="found: False.*fused_weight_gradient_mlp_cuda"):
        check(tiny_config(tiny_run, optimizer=fused), 1, use="train")


@pytest.mark.parametrize(
    "tp, shards_target, before, after",
    [(2, False, None, "1"), (1, False, None, None), (2, True, None, None), (2, False, "8", "8")],
)
def test_one_connection_where_it_orders_kernels(monkeypatch, tp, shards_target, before, after):
    from dspark_megatron.run.ranks.runtime import order_kernels

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")  # so that it is put back afterwards
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    if before is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", before)
    order_kernels(tp, shards_target=shards_target)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == after
