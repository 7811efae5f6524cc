"""What the observer sees of operators, storages and collectives."""

import gc

import pytest
import torch
import torch.nn.functional as F

from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.attention import block_attention
from dspark_megatron.ops.transfer import ContextRanges
from dspark_megatron.planning.observing.gpu_kernels import gpu_kernels
from dspark_megatron.planning.observing.observer import KEPT, Observer
from dspark_megatron.planning.observing.work import Sent, Work, ring_bytes, summed
from dspark_megatron.planning.on_paper.ranks import EverythingOnMeta, HostAnswers, one_of_ranks

META = torch.device("meta")
KIB = 1024


def empty(*size):
    return torch.empty(*size, device=META)


@pytest.fixture
def observer():
    return Observer(META)


def test_a_storage_counts_once_and_until_it_dies(observer):
    with observer:
        tensor = empty(256)
        view = tensor.view(16, 16).t()
        view.add_(1)
        del tensor
        assert observer.storages.total == KIB
        wide = view.reshape(256, 1).expand(256, 100)  # a copy, repeated without memory
        assert observer.storages.total == 2 * KIB
        del view, wide
    assert observer.storages.total == 0


def test_a_storage_that_is_resized_counts_at_its_size(observer):
    with observer:
        tensor = empty(256)
        tensor.untyped_storage().resize_(0)
        assert observer.storages.total == 0
        with observer.phase("again"):
            tensor.untyped_storage().resize_(2 * KIB)
    assert observer.peaks["again"].total == observer.storages.total == 2 * KIB


def test_the_host_s_tensors_do_not_count(observer):
    with observer:
        host = torch.zeros(1000)
        host + 1
        device = host[:256].to(META)
    assert observer.storages.total == KIB and device.device == META


def test_what_autograd_keeps_is_alive_and_named(observer):
    weight = torch.nn.Parameter(empty(16, 16))
    observer.name("weights", [weight])
    with observer:
        with observer.phase("forward"):
            loss = (empty(8, 16) @ weight).exp().sum()
        assert observer.alive == {"weights": KIB, KEPT: KIB, "made in forward": 4}
        with observer.phase("backward"):
            loss.backward()
    # exp's input is not kept; its gradient, the product's and the weight's come one by one.
    peak = observer.peaks["backward"]
    assert peak.total == sum(peak.alive.values()) and peak.alive["weights"] == KIB
    assert peak.alive[KEPT] == KIB // 2 and peak.alive["made in backward"] >= KIB
    gc.collect()
    assert set(observer.alive) == {"weights", "made in forward", "made in backward"}


def test_work_goes_to_the_part_of_its_phase(observer):
    with observer:
        with observer.phase("draft, forward"):
            empty(8, 16) @ empty(16, 4)
        with observer.phase("more", part="draft"):
            total = empty(8, 4)
            total.addmm_(empty(8, 16), empty(16, 4))
        with observer.phase("loss"):
            torch.mm(empty(8, 16), empty(16, 4), out=total)
    product = 2 * 8 * 16 * 4
    read = 4 * (8 * 16 + 16 * 4)
    assert observer.work["draft"] == Work(2 * product, 2 * read + 3 * 4 * 32)
    assert observer.work["loss"] == Work(product, read + 4 * 32)


def test_views_move_nothing_and_rows_that_are_picked_move_alone(observer):
    ids = torch.zeros(10, dtype=torch.int64, device=META)
    with observer:
        table = empty(1000, 4)
        table.view(-1).expand(2, 4000).transpose(0, 1)
        assert observer.work["other"].moved == 0
        table[ids]
        assert observer.work["other"].moved == 2 * 10 * 4 * 4 + ids.nbytes
        before = observer.work["other"].moved
        table.zero_()
        assert observer.work["other"].moved == before + table.nbytes


def test_operators_of_others_are_taken_apart_in_inference_mode(observer):
    with observer, torch.inference_mode():
        torch.matmul(empty(2, 8, 16), empty(16, 4))
    assert observer.work["other"].flops == 2 * 2 * 8 * 16 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_collectives_by_kind_and_group(device):
    import torch.distributed as dist

    device = torch.device(device)
    with one_of_ranks(4) as world:
        pair = dist.new_group([0, 2])
        names = {world.group_name: "all", pair.group_name: "pair"}
        with Observer(device, names) as observer, observer.phase("step"):
            one = torch.zeros(4, device=device)
            dist.all_reduce(one)
            dist.all_reduce(one, group=pair)
            dist.all_reduce(one, group=pair)
            dist.all_gather_into_tensor(one.new_empty(8), one, group=pair)
            dist.reduce_scatter_tensor(one[:1], one)
            dist.all_to_all_single(one.clone(), one)
            dist.broadcast(one, 0)
            dist.all_gather([one.clone() for _ in range(4)], one)
    assert set(observer.work["step"].sent) == {
        Sent("all-reduce", "all", 4, 4, 16, 1),
        Sent("all-reduce", "pair", 2, 3, 32, 2),
        Sent("all-gather", "pair", 2, 3, 16, 1),
        Sent("reduce-scatter", "all", 4, 4, 16, 1),
        Sent("all-to-all", "all", 4, 4, 16, 1),
        Sent("broadcast", "all", 4, 4, 16, 1),
        Sent("all-gather", "all", 4, 4, 16, 1),
    }


def test_what_is_sent_on_a_ring():
    kinds = {"all-reduce": 12, "all-gather": 24, "reduce-scatter": 6, "all-to-all": 6}
    kinds |= {"broadcast": 8, "send": 8}
    assert {kind: ring_bytes(kind, 8, 4) for kind in kinds} == kinds
    assert not any(ring_bytes(kind, 8, 1) for kind in kinds)
    sent = Sent("send", "a", 2, 2, 8, 1)
    assert summed((sent, sent.times(2))) == (sent.times(3),)
    assert Work(1, 2, (sent,)).times(2) + Work(1) == Work(3, 4, (sent.times(2),))


def test_a_process_that_is_a_rank_makes_no_plan():
    with one_of_ranks(2):
        with pytest.raises(ConfigError, match="has not joined a job's ranks, and this one has"):
            with one_of_ranks(2):
                pass


def test_attention_of_a_gpu_keeps_no_scores(observer):
    query, key, value = (
        torch.empty(1, 2, 512, 64, device=META, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    observer.name("inputs", [query, key, value])
    with observer, gpu_kernels(observer):
        with observer.phase("attention"):
            out = F.scaled_dot_product_attention(query, key, value)
            full = observer.work["attention"].flops
            out.sum().backward()
        scores = 2 * 512 * 512 * 2
        assert observer.peaks["attention"].total - 3 * query.nbytes < 8 * query.nbytes < 2 * scores
        assert full == 2 * 2 * 2 * 512 * 512 * 64
        with observer.phase("causal"), torch.no_grad():
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert observer.work["causal"].flops == full // 2
        with observer.phase("masked"):
            mask = torch.ones(512, 512, dtype=torch.bool, device=META)
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert observer.work["masked"].flops == full
        assert observer.peaks["masked"].total > scores // 2  # the mask, as a number for each pair


def test_flex_attention_counts_the_tiles_that_are_not_empty(observer):
    """Four blocks of a tile each see 1 to 4 tiles of the context, and their own: 14 of 32 tiles."""
    bounds = [(0, end) for end in (128, 256, 384, 512)]
    ranges = ContextRanges(bounds, torch.empty(4, 2, dtype=torch.int64, device=META))
    query = torch.empty(1, 2, 512, 64, device=META, requires_grad=True)
    keys = torch.empty(1, 2, 1024, 64, device=META)
    with EverythingOnMeta(), HostAnswers(), gpu_kernels(observer), observer, META:
        attention = block_attention.FlexBlockAttention(ranges, 128, 512)
        with observer.phase("attention"):
            out = attention.attend(query, keys, keys)
    assert observer.work["attention"].flops == 14 / 32 * 2 * 2 * 2 * 512 * 1024 * 64
    with observer, observer.phase("backward"):
        out.sum().backward()
    assert observer.work["backward"].flops == 2.5 * observer.work["attention"].flops
