"""Both attention backends equal attention under a dense mask, and flex's tiles that mask's."""

import itertools
import math
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from dspark_megatron.config import LossConfig
from dspark_megatron.config.attention import FULL, LayerAttention
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.attention import flex
from dspark_megatron.ops.attention.block_attention import block_attention, chosen_backend
from dspark_megatron.ops.attention.flex import TILE, FlexBlockAttention
from dspark_megatron.ops.attention.sink import sink_kv, widened, with_sink
from dspark_megatron.ops.transfer import ContextRanges
from support.reference import context_mask
from support.shapes import SHAPE
from support.tiny_draft import build_tiny_draft, make_samples, sample_logits
from support.tiny_target import tiny_config


class Case(NamedTuple):
    length: int
    """Context tokens of each sample."""
    anchors: list
    """Anchor positions by sample."""
    slots: int = 3
    heads: int = 4
    kv_heads: int = 2

    @property
    def ranges(self):
        return [
            (i * self.length, i * self.length + anchor)
            for i, row in enumerate(self.anchors)
            for anchor in row
        ]

    @property
    def context_length(self):
        return self.length * len(self.anchors)


CASES = {
    "two samples, an anchor at 0": Case(12, [[0, 2, 5, 9], [1, 11]]),
    "a sample without blocks": Case(9, [[3], [], [0, 8]]),
    "no context at all": Case(0, [[0]]),
    "no blocks": Case(8, [[]]),
    "heads of their own": Case(20, [[0, 7, 19]], heads=3, kv_heads=3),
    "one slot": Case(140, [range(140)], slots=1),
    "whole tiles": Case(256, [range(0, 256, 4)], slots=4),
    "many tiles": Case(700, [range(0, 700, 9), range(1, 700, 11)], slots=7, heads=6),
    "blocks longer than a tile": Case(260, [[0, 130, 256]], slots=300),
}


RULES = {
    "full": FULL,
    "causal": LayerAttention(causal=True),
    "window": LayerAttention(300),
    "narrow window": LayerAttention(7),
    "window of the anchor": LayerAttention(9, "anchor"),
    "causal window": LayerAttention(40, "slot", True),
}
"""Windows both wider and narrower than the samples of CASES."""


def dense_mask(case, rule=FULL):
    """[n*k, t + n*k] bool, true is visible: of each sample what `context_mask` says."""
    n, k, t = len(case.ranges), case.slots, case.context_length
    mask = torch.zeros(n * k, t + n * k, dtype=torch.bool)
    row = 0
    for i, anchors in enumerate(case.anchors):
        own = context_mask(torch.tensor([*anchors]).long(), case.length, k, rule)
        rows = slice(row, row + len(own))
        mask[rows, i * case.length : (i + 1) * case.length] = own[:, : case.length]
        mask[rows, t + rows.start : t + rows.stop] = own[:, case.length :]
        row += len(own)
    return mask


def dense_attention(case, query, context_kv, block_kv, rule=FULL, sink=None):
    keys, values = (
        torch.cat([c, b.flatten(0, 1)]).repeat_interleave(case.heads // case.kv_heads, dim=1)
        for c, b in zip(context_kv, block_kv, strict=True)
    )
    scores = torch.einsum("qad,lad->aql", query.flatten(0, 1), keys) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~dense_mask(case, rule), -torch.inf)
    if sink is not None:
        column = sink[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], dim=-1)
    probs = scores.softmax(dim=-1)[..., : len(keys)]
    return torch.einsum("aql,lad->qad", probs, values).view_as(query)


def inputs(case):
    """Query, key and value of the context, key and value of the blocks; all leaves."""
    generator, n, width = torch.Generator().manual_seed(0), len(case.ranges), 16
    of_context = (case.context_length, case.kv_heads, width)
    of_blocks = (n, case.slots, case.kv_heads, width)
    sizes = [(n, case.slots, case.heads, width), of_context, of_context, of_blocks, of_blocks]
    return [torch.randn(size, generator=generator).requires_grad_() for size in sizes]


def sink_of(case):
    """A logit for each head, from one that takes little to one that takes nearly all."""
    return torch.linspace(-3, 6, case.heads).requires_grad_()


def attention(case, backend, group_size=32, rule=FULL):
    return block_attention(
        backend,
        ContextRanges.of(case.ranges, torch.device("cpu")),
        case.slots,
        case.context_length,
        rule,
        head_dim=16,
        group_size=group_size,
    )


@pytest.mark.parametrize("width", [16, 64, 80, 128, 192, 256, 512])
def test_a_sink_is_its_own_score_in_bf16(width):
    """Though no number of the type is the root of 80 or of 128."""
    logit = torch.tensor([1.0], dtype=torch.bfloat16)
    query = with_sink(torch.zeros(1, width, dtype=torch.bfloat16), logit)
    rows = torch.zeros(1, 1, width, dtype=torch.bfloat16)
    [key], [value] = sink_kv(widened((rows, rows)), 1 / math.sqrt(width))
    score = (query.double() * key[0].double()).sum() / math.sqrt(width)
    assert not value.any() and abs(score - 1) < 2**-15


def with_rules(kinds):
    """Every case with the rule of full attention and without sinks, and in turn with each other
    rule and with sinks."""
    others = list(itertools.product([name for name in RULES if name != "full"], (True, False)))
    for i, name in enumerate(CASES):
        for rule, sink in [("full", False), ("full", True), *others[i % 3 :: 3]]:
            for kind in kinds[i % len(kinds) :] if rule != "full" else kinds:
                yield name, rule, sink, kind


@pytest.mark.parametrize("name, rule, sink, group_size", with_rules([64, 3, 1]))
def test_groups_equal_the_dense_mask_in_value_and_gradient(name, rule, sink, group_size):
    case, rule = CASES[name], RULES[rule]
    query, *sides = leaves = inputs(case)
    sink = sink_of(case) if sink else None
    leaves += [sink] if sink is not None else []
    attend = attention(case, "sdpa", group_size, rule)
    got = attend(query, tuple(sides[:2]), tuple(sides[2:]), sink)
    expected = dense_attention(case, query, sides[:2], sides[2:], rule, sink)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    arguments = dict(grad_outputs=upstream, allow_unused=True, materialize_grads=True)
    mine = torch.autograd.grad(got, leaves, **arguments)
    theirs = torch.autograd.grad(expected, leaves, **arguments)
    for grad, plain in zip(mine, theirs, strict=True):
        torch.testing.assert_close(grad, plain, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("name, rule, sink, _", with_rules([None]))
def test_flex_equals_the_dense_mask(name, rule, sink, _):
    case, rule = CASES[name], RULES[rule]
    query, *sides = (leaf.detach() for leaf in inputs(case))
    sink = sink_of(case).detach() if sink else None
    got = attention(case, "flex", rule=rule)(query, tuple(sides[:2]), tuple(sides[2:]), sink)
    expected = dense_attention(case, query, sides[:2], sides[2:], rule, sink)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def listed_tiles(counts, indices):
    """[1, 1, i] and [1, 1, i, j] of a BlockMask -> [i, j] bool."""
    tiles = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (count, index) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        tiles[row, index[:count].long()] = True
    return tiles


def test_keys_of_a_group_are_those_of_its_windows():
    """Of 2000 tokens in one sample: no group goes through more than twice what a block sees, and
    what no block sees is in none."""
    case = Case(2000, [[*range(100, 200, 5), 900, 905, 1800]])
    groups = attention(case, "sdpa", 8, LayerAttention(41)).groups
    assert sum(len(g.mask) for g in groups) == 23 * case.slots
    assert [g.mask.shape[1] - len(g.mask) for g in groups] == [75, 75, 55, 45, 40]
    whole = attention(case, "sdpa", 8).groups
    assert [g.mask.shape[1] - len(g.mask) for g in whole] == [135, 175, 1800]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ranges])
def test_the_tiles_are_those_of_the_dense_mask(name, rule):
    case, rule = CASES[name], RULES[rule]
    dense = dense_mask(case, rule)
    mask = attention(case, "flex", rule=rule).mask
    rows, keys = (torch.arange(size) for size in dense.shape)
    assert mask.shape == (1, 1, *dense.shape)
    assert torch.equal(mask.mask_mod(0, 0, rows[:, None], keys[None]), dense)
    padding = [-size % TILE for size in dense.shape]
    padded = F.pad(dense, (0, padding[1], 0, padding[0]))
    tiles = padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2)
    some, whole = tiles.flatten(2).any(dim=2), tiles.flatten(2).all(dim=2)
    partial = listed_tiles(mask.kv_num_blocks, mask.kv_indices)
    full = listed_tiles(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(full, whole)
    assert torch.equal(partial, some & ~whole)


@pytest.mark.parametrize("name", ["many tiles", "blocks longer than a tile"])
def test_some_tiles_are_empty_some_partial_some_full(name):
    mask = attention(CASES[name], "flex").mask
    partial, full = mask.kv_num_blocks.sum(), mask.full_kv_num_blocks.sum()
    assert partial > 0 and full > 0 and partial + full < mask.kv_indices.numel()


def draft_hidden(runtime, backend):
    """Hidden states of a sample's blocks, and the kind of attention they came from."""
    samples = make_samples(SHAPE, lengths=(20,))
    model = build_tiny_draft(runtime, SHAPE, attention_backend=backend)
    kinds = []
    model.layers[0].self_attention.register_forward_pre_hook(
        lambda module, arguments: kinds.append(type(arguments[2]).__name__)
    )
    anchors = torch.tensor([0, 4, 9, 15])
    hidden, *_ = sample_logits(model, samples.taps[0], samples.input_ids[0], anchors)
    return hidden, kinds


@pytest.mark.parametrize("tp", [1, 2])
def test_a_draft_on_flex_equals_one_on_groups(pool, tp):
    [flex, *_] = pool.run(draft_hidden, world=tp, tp=tp, backend="flex")
    [groups, *_] = pool.run(draft_hidden, world=tp, tp=tp, backend="sdpa")
    assert flex[1] == [FlexBlockAttention.__name__] and groups[1] != flex[1]
    torch.testing.assert_close(flex[0], groups[0], rtol=1e-5, atol=2e-6)


def flex_at_lengths(attend, lengths):
    """Calls for contexts of these lengths, each with anchors of its own."""
    for length in lengths:
        case = Case(length, [range(1, length, 3)])
        query, *sides = (leaf.detach() for leaf in inputs(case))
        with mock.patch.object(flex, "flex_attention", attend):
            attention(case, "flex")(query, tuple(sides[:2]), tuple(sides[2:]))


def test_a_compilation_of_flex_serves_all_lengths():
    """Of more than a tile. Where PyTorch's limit of recompilations is hit, that is an error and no
    return to all scores."""
    torch._dynamo.reset()
    counters.clear()
    flex.compiled_flex.cache_clear()
    flex_at_lengths(flex.compiled_flex("eager"), range(300, 900, 60))
    # A second one is made where sizes that were equal by chance at first are so no more.
    assert counters["stats"]["unique_graphs"] <= 2
    static = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        flex_at_lengths(static, range(300, 900, 60))
    torch._dynamo.reset()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, flex trains")
def test_flex_does_not_train_on_a_cpu(tiny_run):
    from dspark_megatron.run.check import check

    check(tiny_config(tiny_run), 1, use="train")
    with pytest.raises(ConfigError, match="needs CUDA.*attention_backend=sdpa"):
        check(tiny_config(tiny_run, model={"attention_backend": "flex"}), 1, use="train")


def test_auto_takes_flex_on_a_gpu_for_widths_that_were_seen_to_work():
    chosen = {width: chosen_backend("auto", "cuda", width) for width in (16, 64, 128, 256)}
    assert chosen == {16: "sdpa", 64: "flex", 128: "flex", 256: "sdpa"}
    assert chosen_backend("auto", "cpu", 128) == "sdpa"
    assert chosen_backend("flex", "cpu", 16) == "flex", "what was asked for"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the default is compiled")
def test_what_is_compiled_needs_a_compiler(monkeypatch, tiny_run):
    from dspark_megatron.run.check import check

    assert [LossConfig().is_compiled(device) for device in ("cuda", "cpu")] == [True, False]
    assert not LossConfig(compile=False).is_compiled("cuda")
    config = tiny_config(tiny_run, loss={"compile": True})
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++")
    check(config, 1, use="train")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="need a C\\+\\+ compiler .*loss.compile=false"):
        check(config, 1, use="train")
    check(tiny_config(tiny_run), 1, use="train")


@pytest.mark.parametrize("rule", [FULL, LayerAttention(1)])
def test_context_that_no_block_sees_has_a_gradient_of_zeros(rule):
    """A reduction that begins while gradients are made waits for that of every weight."""
    case = Case(4, [[0 if rule == FULL else 4]], slots=1)
    query, *leaves = inputs(case)
    out = attention(case, "sdpa", rule=rule)(query, tuple(leaves[:2]), tuple(leaves[2:]))
    for grad in torch.autograd.grad(out.sum(), leaves[:2]):
        assert not grad.any()
