"""A training step of the draft, parallel and plain, and what must be equal."""

import pytest
import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.conversion.layouts.names import to_hugging_face
from support.gemma4_reference import PlainGemma4Draft
from support.reference import PlainDraft, plain_blocks, plain_loss
from support.tiny_draft import (
    assemble,
    build_tiny_draft,
    layout_of,
    make_samples,
    make_step,
    rank_micro_batches,
    target_head,
)

GAMMA = 4.0
TWINS = {"qwen3": PlainDraft, "gemma4": PlainGemma4Draft}


def step_gradients(runtime, shape, micro_batch_size, loss=None, dtype="float32", **options):
    """One step over all samples on this rank: weights, gradients, metrics."""
    from dspark_megatron.training.metrics import MetricSums

    model = build_tiny_draft(runtime, shape, getattr(torch, dtype), **options)
    samples = make_samples(shape, loss=loss)
    step = make_step(runtime, model, samples, loss)
    metrics = MetricSums.zeros(shape.num_draft_tokens, runtime.device)
    reach, drafted = shape.attention.reach(shape.num_layers), shape.num_draft_tokens
    batches = rank_micro_batches(runtime, samples, drafted, micro_batch_size, loss, reach)
    step.run(batches, metrics)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fixed = {n: p for n, p in model.named_parameters() if n.endswith("layer_scalar.value")}
    total = metrics.reduced(dp_group=runtime.dp_group)
    return {
        "weights": {n: p.detach().clone() for n, p in {**trained, **fixed}.items()},
        "grads": {n: p.main_grad.clone() for n, p in trained.items()},
        "layout": {**layout_of(model), **dict.fromkeys(fixed, (None, 1))},
        "metrics": total.means(step.forward_step.term_weights),
        "tp_rank": runtime.tp_group.rank(),
        "dp_rank": runtime.dp_group.rank(),
    }


def whole(ranks, what, shape):
    """Tensors under Hugging Face names from the ranks of the first data-parallel replica."""
    replica = sorted((r for r in ranks if r["dp_rank"] == 0), key=lambda r: r["tp_rank"])
    layout = {n: split for n, split in replica[0]["layout"].items() if n in replica[0][what]}
    full = assemble([r[what] for r in replica], layout)
    return {name: x for name, x in to_hugging_face(shape, full.get) if x is not None}


def plain_terms(shape, weights, loss):
    """The plain twin and, for each of the same samples, its weighted sums."""
    twin = TWINS[shape.architecture](shape)
    embed, head = target_head(shape)
    twin.load_state_dict({**weights, "embed_tokens.weight": embed, "lm_head.weight": head})
    samples = make_samples(shape, loss=loss)
    terms, from_anchor = [], shape.sample_from_anchor
    for ids, mask, anchors, taps, last in zip(
        samples.input_ids,
        samples.loss_masks,
        samples.anchors,
        samples.taps,
        samples.last_hidden,
        strict=True,
    ):
        out = twin(taps, ids, anchors)
        blocks = plain_blocks(
            ids,
            mask,
            anchors,
            shape.block_size,
            loss.supervised_slots,
            loss.slot_mask,
            from_anchor,
        )
        at = anchors[:, None] + torch.arange(shape.block_size)
        if not from_anchor:
            at = at - 1  # the state before a slot's own position predicts its token
        at = at.clamp(0, len(ids) - 1)
        target_logits = twin.lm_head(last[at])
        from_target = loss.ce_labels == "target_argmax"
        sums = plain_loss(
            out.logits,
            target_logits,
            target_logits.argmax(dim=-1) if from_target else blocks.labels,
            blocks.eval_mask,
            out.confidence_logits,
            GAMMA,
            (loss.terms.ce, loss.terms.l1, loss.confidence_head_alpha),
            from_anchor,
            loss.weighting,
            loss.confidence_weights,
        )
        terms.append({**sums, "eval_mask": blocks.eval_mask, "count": blocks.eval_mask.sum()})
    return twin, terms


def gradients(twin):
    return {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}


def plain_step(shape, weights):
    """Loss and gradients of the plain twin, divided once."""
    twin, terms = plain_terms(shape, weights, LossConfig())
    names = ("loss_sum", "ce_sum", "l1_sum", "confidence_sum", "weight")
    totals = {name: sum(term[name] for term in terms) for name in names}
    loss = totals["loss_sum"] / totals["weight"]
    loss.backward()
    return loss.item(), gradients(twin), {k: v.item() for k, v in totals.items()}


def assert_plain_step(ranks, shape):
    weights = whole(ranks, "weights", shape)
    loss, grads, totals = plain_step(shape, weights)
    metrics = ranks[0]["metrics"]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["l1_loss"] == pytest.approx(totals["l1_sum"] / totals["weight"], rel=1e-5)
    assert_same_gradients(whole(ranks, "grads", shape), grads)


def assert_same_gradients(got, wanted):
    assert set(got) == set(wanted)
    for name, expected in wanted.items():
        torch.testing.assert_close(
            got[name], expected, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        # The absolute tolerance is for elements near zero; the whole must be as near.
        assert (got[name] - expected).norm() < 1e-5 * expected.norm(), name
