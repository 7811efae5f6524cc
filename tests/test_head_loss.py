"""The fused head loss equals the plain one in value and every gradient, however it is split."""

import pytest
import torch
from reference import plain_head_loss

from dspark_megatron.ops.head_loss import HeadWeights, head_loss
from dspark_megatron.ops.vocab_parallel import VocabShard
from dspark_megatron.shape import padded_vocab_size

ROWS, HIDDEN, RANK = 11, 16, 6


def make_inputs(vocab_size, dtype, kind="random", with_latent=True):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    scale = {"random": 0.5, "extreme": 2000.0}[kind]
    return {
        "hidden": normal(ROWS, HIDDEN),
        "latent": normal(ROWS, RANK) if with_latent else None,
        "teacher_hidden": normal(ROWS, HIDDEN),
        "labels": torch.randint(0, vocab_size, (ROWS,), generator=generator),
        "weights": torch.rand(ROWS, generator=generator),
        "lm_head": normal(vocab_size, HIDDEN, scale=scale),
        "markov_w2": normal(vocab_size, RANK, scale=scale) if with_latent else None,
    }


def plain(inputs, alphas, upstream):
    leaves = leaf_copies(inputs)
    loss, ce, l1 = plain_head_loss(
        leaves["hidden"],
        leaves["latent"],
        inputs["teacher_hidden"] if alphas[2] else None,
        inputs["labels"],
        inputs["weights"],
        inputs["lm_head"],
        leaves["markov_w2"],
        ce_alpha=alphas[0],
        l1_alpha=alphas[1],
    )
    (loss * upstream).backward()
    return results(loss, ce, l1, leaves)


def leaf_copies(inputs):
    names = ("hidden", "latent", "markov_w2")
    return {n: None if inputs[n] is None else inputs[n].clone().requires_grad_() for n in names}


def results(loss, ce, l1, leaves):
    grads = {name: None if x is None else x.grad for name, x in leaves.items()}
    return {"loss": loss.detach(), "ce": ce.detach(), "l1": l1.detach(), **grads}


def fused(runtime, inputs, alphas, upstream, chunk_rows):
    """One rank's part; vocabulary matrices are cut to this rank's rows, padded with garbage."""
    vocab_size = inputs["lm_head"].shape[0]
    padded = padded_vocab_size(vocab_size, runtime.tp_group.size())
    shard = VocabShard.of_group(vocab_size, padded, runtime.tp_group)
    local = dict(inputs)
    for name in ("lm_head", "markov_w2"):
        if inputs[name] is not None:
            full = torch.cat(
                [
                    inputs[name],
                    inputs[name].new_full((padded - vocab_size, inputs[name].shape[1]), 3.0),
                ]
            )
            local[name] = full[shard.vocab_start_index : shard.vocab_end_index]
    leaves = leaf_copies(local)
    result = head_loss(
        leaves["hidden"],
        leaves["latent"],
        inputs["teacher_hidden"] if alphas[2] else None,
        inputs["labels"],
        inputs["weights"],
        HeadWeights(local["lm_head"], leaves["markov_w2"], shard),
        ce_alpha=alphas[0],
        l1_alpha=alphas[1],
        chunk_rows=chunk_rows,
        tp_group=runtime.tp_group,
    )
    (result.loss * upstream).backward()
    return results(result.loss, result.ce, result.l1, leaves)


def compare(ranks, expected, vocab_size, rtol, atol):
    for name in ("loss", "ce", "l1", "hidden", "latent"):
        for got in ranks:
            if expected[name] is None:
                assert got[name] is None
                continue
            torch.testing.assert_close(
                got[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    if expected["markov_w2"] is not None:
        w2 = torch.cat([got["markov_w2"] for got in ranks])
        torch.testing.assert_close(w2[:vocab_size], expected["markov_w2"], rtol=rtol, atol=atol)
        assert not w2[vocab_size:].any(), "padded rows must get no gradient"


# Alphas: CE weight, L1 weight, whether there is a teacher.
CASES = [
    pytest.param((0.1, 0.9, True), 64, True, id="full"),
    pytest.param((0.1, 0.9, True), 61, True, id="padded vocabulary"),
    pytest.param((1.0, 0.0, True), 61, True, id="CE only, teacher for accept rates"),
    pytest.param((1.0, 0.0, False), 61, True, id="no teacher"),
    pytest.param((0.0, 1.0, True), 61, True, id="L1 only"),
    pytest.param((0.1, 0.9, True), 61, False, id="no Markov head"),
    pytest.param((0.1, 0.9, True), 5, True, id="a shard of nothing but padding"),
]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("alphas, vocab_size, with_latent", CASES)
def test_equals_the_plain_loss(pool, alphas, vocab_size, with_latent, tp):
    inputs = make_inputs(vocab_size, torch.float32, with_latent=with_latent)
    expected = plain(inputs, alphas, upstream=0.37)
    for chunk_rows in (1, 4, 100):
        got = pool.run(
            fused,
            world=tp,
            tp=tp,
            inputs=inputs,
            alphas=alphas,
            upstream=0.37,
            chunk_rows=chunk_rows,
        )
        compare(got, expected, vocab_size, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tp", [1, 2])
def test_bfloat16(pool, tp):
    """Logits are rounded to bf16 (8 bits) before the softmax, once by us and twice by the plain
    sum of two products: relative differences of a few 2^-8."""
    inputs = make_inputs(61, torch.bfloat16)
    expected = plain(inputs, (0.1, 0.9, True), upstream=1.0)
    got = pool.run(
        fused, world=tp, tp=tp, inputs=inputs, alphas=(0.1, 0.9, True), upstream=1.0, chunk_rows=4
    )
    compare(got, expected, 61, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("tp", [1, 2])
def test_extreme_logits_stay_finite(pool, tp):
    inputs = make_inputs(61, torch.float32, kind="extreme")
    expected = plain(inputs, (0.1, 0.9, True), upstream=1.0)
    got = pool.run(
        fused, world=tp, tp=tp, inputs=inputs, alphas=(0.1, 0.9, True), upstream=1.0, chunk_rows=4
    )
    assert all(torch.isfinite(x).all() for x in got[0].values())
    torch.testing.assert_close(got[0]["l1"], expected["l1"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[0]["ce"], expected["ce"], rtol=1e-4, atol=1e-2)


def one_hot_case(disjoint):
    """Draft and target each sure of one token: the same one, or another."""
    inputs = make_inputs(8, torch.float32, with_latent=False)
    inputs["lm_head"] = torch.eye(8, HIDDEN) * 100
    inputs["hidden"] = torch.eye(HIDDEN)[torch.zeros(ROWS, dtype=torch.long)]
    inputs["teacher_hidden"] = torch.eye(HIDDEN)[torch.full((ROWS,), int(disjoint))]
    return inputs


@pytest.mark.parametrize("disjoint, l1", [(True, 2.0), (False, 0.0)])
def test_l1_of_disjoint_and_identical_distributions(pool, disjoint, l1):
    got = pool.run(
        fused,
        world=2,
        tp=2,
        inputs=one_hot_case(disjoint),
        alphas=(0.0, 1.0, True),
        upstream=1.0,
        chunk_rows=4,
    )
    torch.testing.assert_close(got[0]["l1"], torch.full((ROWS,), l1))


def test_l1_needs_a_teacher():
    with pytest.raises(ValueError, match="teacher_hidden"):
        head_loss(
            None, None, None, None, None, None, ce_alpha=1, l1_alpha=1, chunk_rows=1, tp_group=None
        )
