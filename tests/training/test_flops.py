"""The operations in metrics.jsonl against PyTorch's counter around the same steps."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dspark_megatron.config.attention import LayerAttention
from dspark_megatron.data.blocks import draft_blocks
from dspark_megatron.ops.attention.grouped import GroupedBlockAttention
from dspark_megatron.training.watching.flops import pairs_seen
from dspark_megatron.training.watching.target_flops import TargetFlops
from support.target_families import FAMILIES, SIZES
from support.tiny_target import tiny_config
from support.training_runs import curve, run_training

aten = torch.ops.aten
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def attention_flop(query, key, value, *_, **__):
    return sdpa_flop_count(query, key, value)


def product_flop(_, left, right, **__):
    return 2 * left[0] * left[1] * right[1]


NOT_IN_PYTORCH = {getattr(aten, ATTENTION): attention_flop, aten.addmm_: product_flop}


def counted_run(runtime, config):
    """What the counter sees of a run on this rank, of the target's passes and of the rest: products
    of weights, and those of attention in the forward pass. And the lengths of the samples that the
    target took, and the context tokens that the draft took."""
    from dspark_megatron.training import forward_step, loop

    counters, target, whole, lengths, context = [], Counter(), Counter(), [], []
    run, states = loop.GradientStep.run, forward_step.ForwardStep._target_states

    def counts():
        found = counters[-1].get_flop_counts().get("Global", {}).items()
        attention = sum(n for operator, n in found if operator.__name__ == ATTENTION)
        return Counter(attention=attention, weights=sum(n for _, n in found) - attention)

    def target_counted(self, batch, metrics):
        before = counts()
        given = states(self, batch, metrics)
        target.update(counts() - before)
        lengths.extend(batch.lengths)
        context.append(len(batch.blocks.context_positions))
        return given

    def step_counted(self, batches, metrics):
        with FlopCounterMode(display=False, custom_mapping=NOT_IN_PYTORCH) as counter:
            counters.append(counter)
            run(self, batches, metrics)
            whole.update(counts())

    loop.GradientStep.run, forward_step.ForwardStep._target_states = step_counted, target_counted
    try:
        run_training(runtime, config)
    finally:
        loop.GradientStep.run, forward_step.ForwardStep._target_states = run, states
    return target, whole - target, lengths, sum(context)


def counted_and_logged(pool, settings, output, tp, **sections):
    train = {"output_dir": str(output), "iterations": 3, "global_batch_size": 1}
    # One block a group, so that SDPA computes what slots see and no more.
    model = {"attention_group_size": 1, **sections.pop("model", {})}
    layout = {"tensor_parallel": tp}
    config = tiny_config(settings, train=train, model=model, parallel=layout, **sections)
    ranks = pool.run(counted_run, world=tp, tp=tp, config=config)
    _, _, lengths, context = ranks[0]
    target, draft = (
        Counter(
            weights=sum(r[i]["weights"] for r in ranks),
            attention=sum(r[i]["attention"] for r in ranks),
        )
        for i in (0, 1)
    )
    # Of a square of scores, half and the diagonal are seen. All lengths enter by their squares.
    seen = sum(n * (n + 1) / 2 for n in lengths) / sum(n * n for n in lengths)
    # Megatron-Core's linear makes a gradient of its input where nothing needs it: fc's, 64 to 32.
    unused = 2 * context * 64 * 32
    counted = target["weights"] + seen * target["attention"]
    counted += draft["weights"] - unused + 3 * draft["attention"]
    rows = curve(output)
    seconds = [row["tflops_per_rank"] * row["step_seconds"] for row in rows]
    assert len(set(lengths)) > 1 and target["attention"] and draft["attention"]
    return counted, 1e12 * tp * sum(seconds)


WINDOW = {"window": 12, "window_origin": "anchor", "sliding_layers": [1]}
CE_ALONE = {"terms": {"ce": 1.0}}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"markov_head_type": "rnn", "attention": WINDOW}},
        {"model": {"enable_confidence_head": False, "markov_rank": 0}, "loss": CE_ALONE},
    ],
    ids=["default", "rnn and window", "cross entropy alone"],
)
def test_operations_are_those_that_are_counted(pool, tiny_run, tmp_path, sections):
    counted, logged = counted_and_logged(pool, tiny_run, tmp_path, 1, **sections)
    assert logged == pytest.approx(counted, rel=1e-9)


def test_ranks_share_the_operations(pool, tiny_run, tmp_path):
    """The heads that each rank has whole are counted once, as at one rank."""
    model = {"markov_head_type": "gated"}
    counted, logged = counted_and_logged(pool, tiny_run, tmp_path, 2, model=model)
    assert counted == pytest.approx(logged, rel=0.02)


@pytest.mark.parametrize(
    "rule",
    [LayerAttention(), LayerAttention(window=6, causal=True), LayerAttention(6, "anchor")],
)
def test_pairs_are_those_of_the_masks(rule):
    ids = [torch.arange(40), torch.arange(20)]
    masks, anchors = [torch.ones(len(x)) for x in ids], [torch.tensor(x) for x in ([3, 9, 30], [7])]
    blocks = draft_blocks(ids, masks, anchors, 4, reach=rule.reach)
    context = len(blocks.context_positions)
    attention = GroupedBlockAttention(blocks.context_ranges, 4, context, rule, group_size=2)
    visible = sum(int(group.mask.sum()) for group in attention.groups)
    assert pairs_seen(blocks, 4, rule) == visible > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_of_a_family(family):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    config._attn_implementation = config._experts_implementation = "eager"
    formula, tokens = TargetFlops.of(config, None), 20
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(2, 2 + tokens)[None], use_cache=False)
    # Without a kernel for it, attention computes the square of all scores.
    square = sum(2 * n * width * tokens**2 for (width, _), n in formula.pairs.items())
    assert counter.get_total_flops() == 2 * tokens * formula.weights + square
    windows = {window for _, window in formula.pairs}
    assert windows == ({None, 6} if family == "gpt_oss" else {None})


def test_pairs_within_a_window():
    assert TargetFlops(0, {(1, 3): 1, (10, None): 2}).of_lengths([5]) == 2 * 12 + 2 * 20 * 15
    assert TargetFlops(7, {}).of_lengths([5, 3]) == 2 * 7 * 8


def test_a_target_that_cannot_be_counted():
    from transformers import AutoConfig

    assert (
        TargetFlops.of(AutoConfig.for_model("gpt_neox", **{**SIZES, "rotary_pct": 1.0}), None)
        is None
    )
