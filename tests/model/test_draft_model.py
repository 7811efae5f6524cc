"""The split draft equals its plain twin in loss and every gradient, for every layout."""

import pytest
import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.config.loading import config_from_dict
from dspark_megatron.data.blocks import draft_blocks
from support.draft_steps import (
    GAMMA,
    assert_plain_step,
    assert_same_gradients,
    gradients,
    plain_terms,
    step_gradients,
    whole,
)
from support.reference import plain_blocks
from support.shapes import SHAPE, SHAPES
from support.tiny_draft import (
    build_tiny_draft,
    make_samples,
    make_step,
    rank_micro_batches,
    sample_logits,
)

# World size, tensor-parallel size, micro-batch size.
LAYOUTS = [(1, 1, 1), (1, 1, 4), (2, 2, 1), (4, 4, 2), (2, 1, 1), (2, 1, 2), (4, 2, 1)]


@pytest.mark.parametrize("world, tp, micro_batch_size", LAYOUTS)
@pytest.mark.parametrize("kind", SHAPES)
def test_step_equals_the_plain_twin(pool, kind, world, tp, micro_batch_size):
    shape, layout = SHAPES[kind], dict(world=world, tp=tp)
    assert_plain_step(
        pool.run(step_gradients, **layout, shape=shape, micro_batch_size=micro_batch_size), shape
    )


SPLIT_ROWS = [
    (kind, *layout, (i + j) % 2 == 1)
    for i, kind in enumerate(SHAPES)
    for j, layout in enumerate([(2, 2, 1), (4, 4, 2), (4, 2, 1)])
]
"""Every kind at every layout; each of both with recompute and without."""


@pytest.mark.parametrize("kind, world, tp, micro_batch_size, recompute", SPLIT_ROWS)
def test_sequence_parallel_equals_the_plain_twin(
    pool, kind, world, tp, micro_batch_size, recompute
):
    """The samples have 13 to 15 slots and 9 to 17 tokens of context: rows that do not divide."""
    shape, layout = SHAPES[kind], dict(world=world, tp=tp, micro_batch_size=micro_batch_size)
    options = dict(sequence_parallel=True, recompute_activations=recompute)
    assert_plain_step(pool.run(step_gradients, **layout, shape=shape, **options), shape)


def test_weights_do_not_depend_on_the_layout(pool):
    runs = [
        whole(
            pool.run(step_gradients, world=n, tp=n, shape=SHAPE, micro_batch_size=1),
            "weights",
            SHAPE,
        )
        for n in (1, 2, 4)
    ]
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_bfloat16_follows_float32(pool, sequence_parallel):
    """bf16 keeps 8 bits; through two layers and a softmax, gradients agree to a few percent."""
    arguments = dict(world=2, tp=2, shape=SHAPE, micro_batch_size=1)
    arguments["sequence_parallel"] = sequence_parallel
    exact = pool.run(step_gradients, **arguments)
    rounded = pool.run(step_gradients, dtype="bfloat16", **arguments)
    assert rounded[0]["metrics"]["loss"] == pytest.approx(exact[0]["metrics"]["loss"], rel=0.02)
    for name, expected in whole(exact, "grads", SHAPE).items():
        got = whole(rounded, "grads", SHAPE)[name]
        assert got.dtype == torch.float32, "gradients accumulate in fp32"
        error = (got - expected).norm() / expected.norm()
        assert error < 0.1, f"{name}: {error:.3f}"


def test_deepspec_normalization_is_the_mean_of_micro_batch_means(pool):
    loss = LossConfig(chunk_rows=4, normalization="deepspec")
    arguments = dict(shape=SHAPE, micro_batch_size=1, loss=loss)
    one = pool.run(step_gradients, world=1, tp=1, **arguments)
    two = pool.run(step_gradients, world=2, tp=1, **arguments)
    plain = pool.run(step_gradients, world=1, tp=1, shape=SHAPE, micro_batch_size=1)
    samples = make_samples(SHAPE)
    decay = torch.exp(-torch.arange(SHAPE.block_size) / GAMMA)
    weights = [
        (plain_blocks(i, m, a, SHAPE.block_size).eval_mask * decay).sum().item()
        for i, m, a in zip(samples.input_ids, samples.loss_masks, samples.anchors, strict=True)
    ]
    assert len(set(weights)) > 1, "uneven micro-batches, or the forms would agree"
    same = "confidence_head.proj.bias"
    assert not torch.allclose(one[0]["grads"][same], plain[0]["grads"][same])
    assert not torch.allclose(one[0]["grads"][same], two[0]["grads"][same]), (
        "per-micro-batch means depend on the layout: that is why they are not the default"
    )
    whole_batch = {**arguments, "micro_batch_size": 4}
    torch.testing.assert_close(
        pool.run(step_gradients, world=1, tp=1, **whole_batch)[0]["grads"][same],
        plain[0]["grads"][same],
    )


LOCAL_LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 1, 2), (4, 2, 2)]


@pytest.mark.parametrize("world, tp, micro_batch_size", LOCAL_LAYOUTS)
@pytest.mark.parametrize("preset, divisor", [("modelopt", "weight"), ("speculators", "count")])
def test_a_preset_is_the_plain_mean_of_local_means(
    pool, preset, divisor, world, tp, micro_batch_size
):
    """With all else that a preset changes: anchors, slots, labels and the unit of L1."""
    loss = preset_loss(preset)
    arguments = dict(shape=SHAPE, micro_batch_size=micro_batch_size, loss=loss)
    ranks = pool.run(step_gradients, world=world, tp=tp, **arguments)
    twin, terms = plain_terms(SHAPE, whole(ranks, "weights", SHAPE), loss)
    batches = [terms[i : i + micro_batch_size] for i in range(0, len(terms), micro_batch_size)]
    means = [sum(t["loss_sum"] for t in b) / sum(t[divisor] for t in b) for b in batches]
    (sum(means) / len(batches)).backward()
    assert_same_gradients(whole(ranks, "grads", SHAPE), gradients(twin))


def preset_loss(preset):
    return config_from_dict({"loss": {"preset": preset, "chunk_rows": 4}}).loss


def block_states(runtime, shape, changed=(), shifted=()):
    """Hidden states and this rank's logits of one sample's blocks, with the tokens at `changed`
    replaced and the target's states at `shifted` (default: the same positions) moved."""
    samples = make_samples(shape, lengths=(20,))
    ids, taps = samples.input_ids[0].clone(), samples.taps[0].clone()
    ids[list(changed)] = (ids[list(changed)] + 7) % 60
    taps[list(shifted or changed)] += 1.0
    model = build_tiny_draft(runtime, shape)
    return sample_logits(model, taps, ids, torch.tensor([4, 9, 15]))[:2]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_block_sees_its_context_and_its_anchor_token_and_nothing_else(pool, tp):
    """Three blocks of 3 slots with anchors at 4, 9 and 15; the middle one is looked at."""

    def run(**changes):
        ranks = pool.run(block_states, world=tp, tp=tp, shape=SHAPE, **changes)
        return torch.stack([rank[0][1] for rank in ranks]), torch.stack([r[1][1] for r in ranks])

    hidden, logits = run()
    after_block = run(changed=range(12, 20))
    assert torch.equal(after_block[0], hidden) and torch.equal(after_block[1], logits)
    in_block = run(changed=(10, 11))  # labels; the Markov head is teacher-forced with them
    assert torch.equal(in_block[0], hidden) and not torch.equal(in_block[1], logits)
    assert torch.equal(run(shifted=range(9, 20))[1], logits), "the state at the anchor is not seen"
    assert not torch.equal(run(changed=(9,))[0], hidden), "the anchor's token is seen"
    assert not torch.equal(run(changed=(8,))[0], hidden), "the context is seen"
    assert not torch.equal(run(shifted=(8,))[0], hidden)


def micro_batch_without_blocks(runtime, shape, loss=None):
    """Gradients of a step with one empty micro-batch more."""
    from dspark_megatron.data.batch import MicroBatch
    from dspark_megatron.training.metrics import MetricSums

    model, samples = build_tiny_draft(runtime, shape), make_samples(shape, loss=loss)
    step = make_step(runtime, model, samples, loss)
    batches = rank_micro_batches(runtime, samples, shape.num_draft_tokens, 1, loss)
    ids = torch.zeros(1, 5, dtype=torch.long)
    empty = draft_blocks(ids, torch.zeros(1, 5), [torch.tensor([]).long()], 3)
    batches.insert(1, MicroBatch.of(ids, empty))
    metrics = MetricSums.zeros(shape.num_draft_tokens, runtime.device)
    step.run(batches, metrics)
    return {n: p.main_grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_micro_batch_without_blocks_changes_nothing(pool):
    got = pool.run(micro_batch_without_blocks, world=2, tp=2, shape=SHAPE)
    arguments = dict(world=2, tp=2, shape=SHAPE, micro_batch_size=1)
    expected = pool.run(step_gradients, **arguments)
    for mine, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(mine[name], theirs["grads"][name]) for name in mine)


@pytest.mark.parametrize("preset", ["modelopt", "speculators"])
def test_a_local_mean_counts_a_micro_batch_without_blocks_as_zero(pool, preset):
    """Two micro-batches on each of two ranks become three."""
    loss = preset_loss(preset)
    got = pool.run(micro_batch_without_blocks, world=2, tp=1, shape=SHAPE, loss=loss)
    expected = pool.run(step_gradients, world=2, tp=1, shape=SHAPE, micro_batch_size=1, loss=loss)
    for name, gradient in expected[0]["grads"].items():
        torch.testing.assert_close(got[0][name], gradient * 2 / 3)


@pytest.mark.parametrize("normalization", ["global_step", "deepspec", "local"])
def test_slots_without_weight_teach_nothing(pool, normalization):
    """exp(-1 / 0.005) is zero in fp32, and no first slot is supervised."""
    loss = LossConfig(
        chunk_rows=4,
        loss_decay_gamma=0.005,
        anchor_rule="token",
        supervised_slots="all",
        normalization=normalization,
    )
    for gradient in pool.run(late_slots_only, world=1, tp=1, shape=SHAPE, loss=loss)[0]:
        assert not gradient.any()


def late_slots_only(runtime, shape, loss):
    """Gradients of a step whose one block starts at the last token of an answer."""
    from dspark_megatron.training.metrics import MetricSums

    model, samples = build_tiny_draft(runtime, shape), make_samples(shape, (9,))
    samples.loss_masks = [torch.tensor([0, 1, 0, 1, 0, 0, 0, 0, 0])]
    samples.anchors = [torch.tensor([1])]
    batches = rank_micro_batches(runtime, samples, shape.num_draft_tokens, 1, loss)
    assert batches[0].blocks.eval_mask.tolist() == [[False, True, False]]
    step = make_step(runtime, model, samples, loss)
    step.run(batches, MetricSums.zeros(shape.num_draft_tokens, runtime.device))
    return [p.main_grad.clone() for p in model.parameters() if p.requires_grad]
