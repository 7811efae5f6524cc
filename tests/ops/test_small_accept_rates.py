"""LK-alpha is exact where draft and target hardly agree: it divides by the accept rate."""

import math

import pytest
import torch

from dspark_megatron.ops.head_loss import HeadLoss, HeadWeights
from dspark_megatron.ops.objective.objective import Objective
from support.head_loss_inputs import HIDDEN, make_inputs, shard_of
from support.reference import plain_head_loss

VOCAB = 61
SHIFTS = torch.linspace(7.5, 14.5, 11)
"""Of the logits of half of the tokens, by row: the draft's are one half, the target's the other."""
FLOOR = 1e-5
LEAVES = ("hidden", "latent", "markov_w2")


def nearly_disjoint():
    """Inputs whose accept rates fall from 1e-3 to 1e-6."""
    inputs = make_inputs(VOCAB, torch.float32)
    half = torch.arange(VOCAB) % 2 == 0  # some of each in every shard
    for name, column in (("hidden", 0), ("target_hidden", 1)):
        inputs["lm_head"][:, column] = (half if column == 0 else ~half).float()
        inputs[name] = 0.3 * inputs[name]
        inputs[name][:, :2] = 0
        inputs[name][:, column] = SHIFTS
    inputs["latent"] = 0.3 * inputs["latent"]
    return inputs


def exact(inputs, terms):
    """In float64 by autograd: terms, gradients by name, accept rates."""
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    leaves = {name: inputs[name].requires_grad_() for name in LEAVES}
    loss, found = plain_head_loss(**inputs, terms=terms)
    gradients = dict(zip(LEAVES, torch.autograd.grad(loss, leaves.values()), strict=True))
    return found, gradients, 1 - found["l1"].detach() / 2


def fused(runtime, inputs, terms):
    shard, lm_head, w2 = shard_of(inputs, runtime.tp_group)
    leaves = {**inputs, "markov_w2": w2}
    leaves = {name: leaves[name].clone().requires_grad_() for name in LEAVES}
    weight = torch.cat([lm_head, torch.zeros_like(w2)], dim=1)
    head = HeadWeights(weight, leaves["markov_w2"], shard)
    head_loss = HeadLoss(head, Objective(**terms), 4, tp_group=runtime.tp_group)
    rest = (inputs[name] for name in ("target_hidden", "labels", "weights"))
    result = head_loss(leaves["hidden"], leaves["latent"], *rest)
    gradients = torch.autograd.grad(result.loss, leaves.values())
    return result.terms, dict(zip(LEAVES, gradients, strict=True)), result.accept_rate


@pytest.mark.parametrize("terms", [{"lk_alpha": 1.0}, {"lk_alpha": 0.5, "kl": 0.01, "l1": 0.1}])
@pytest.mark.parametrize("tp", [1, 2])
def test_small_accept_rates_are_exact(pool, tp, terms):
    """Each row for itself: a row with a large gradient must not hide what is wrong in another."""
    inputs = nearly_disjoint()
    expected, gradients, rates = exact(inputs, terms)
    assert rates.max() > 1e-3 and rates.min() < 1e-6
    ranks = pool.run(fused, world=tp, tp=tp, inputs=inputs, terms=terms)
    for found, own, accept_rate in ranks:
        torch.testing.assert_close(
            found["lk_alpha"].double(), expected["lk_alpha"], rtol=1e-6, atol=0
        )
        for name in ("hidden", "latent"):
            error = (own[name] - gradients[name]).norm(dim=1)
            assert (error <= 2e-5 * gradients[name].norm(dim=1)).all(), name
        # What is logged and what D-PARD weighs with comes from L1.
        torch.testing.assert_close(accept_rate.double(), rates, rtol=0, atol=2e-6)
    w2 = torch.cat([own["markov_w2"] for _, own, _ in ranks])[:VOCAB]
    assert (w2 - gradients["markov_w2"]).norm() <= 2e-5 * gradients["markov_w2"].norm()


@pytest.mark.parametrize("tp", [1, 2])
def test_below_its_smallest_accept_rate_lk_alpha_is_constant(pool, tp):
    inputs, terms = nearly_disjoint(), {"lk_alpha": 1.0}
    _, _, rates = exact(inputs, terms)
    below = rates < FLOOR
    assert 0 < below.sum() < len(below) and inputs["hidden"].shape == (len(below), HIDDEN)
    for found, own, _ in pool.run(fused, world=tp, tp=tp, inputs=inputs, terms=terms):
        assert own["hidden"][below].eq(0).all() and own["hidden"][~below].any(dim=1).all()
        floor = torch.full_like(found["lk_alpha"][below], -math.log(FLOOR))
        torch.testing.assert_close(found["lk_alpha"][below], floor)
