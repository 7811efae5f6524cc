"""The fused head loss equals the plain one in value and every gradient, however it is split."""

import functools
import math
import shutil
from dataclasses import replace

import pytest
import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.config.objective.terms import TERMS
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops import logit_terms
from dspark_megatron.ops.chunk_budget import chunk_rows
from dspark_megatron.ops.head_loss import HeadLoss, HeadWeights
from dspark_megatron.ops.logit_transform import LogitTransform
from dspark_megatron.ops.objective.objective import Objective
from support.head_loss_inputs import HIDDEN, ROWS, make_inputs, shard_of
from support.reference import plain_head_loss

PAPER, IDENTITY = Objective(ce=0.1, l1=0.9), LogitTransform()
NEITHER = (1.0, None), (1.0, None)
"""Scale and soft cap of the draft's base logits, and of the target's."""


@pytest.fixture(scope="module", params=[1, 2, 4])
def tp(request):
    """For a module, so that all tests of one size run before those of the next: ranks that form
    new groups between any two tests take most of the time."""
    return request.param


def plain(inputs, objective, upstream=1.0, transforms=NEITHER):
    leaves = leaf_copies(inputs)
    loss, terms = plain_head_loss(
        leaves["hidden"],
        leaves["latent"],
        inputs["target_hidden"],
        inputs["labels"],
        inputs["weights"],
        inputs["lm_head"],
        leaves["markov_w2"],
        terms={name: getattr(objective, name) for name in TERMS},
        labels_from_target=objective.labels_from_target,
        draft_transform=transforms[0],
        target_transform=transforms[1],
    )
    (loss * upstream).backward()
    return results(loss, terms, leaves)


def leaf_copies(inputs):
    names = ("hidden", "latent", "markov_w2")
    return {n: None if inputs[n] is None else inputs[n].clone().requires_grad_() for n in names}


def results(loss, terms, leaves):
    grads = {name: None if x is None else x.grad for name, x in leaves.items()}
    known = {"loss": loss, **dict.fromkeys(TERMS), **terms}
    return {**{n: None if x is None else x.detach() for n, x in known.items()}, **grads}


def head_of(shard, lm_head, markov_w2, transform=IDENTITY):
    """What is in the columns for W2 must not matter."""
    weight = lm_head
    if markov_w2 is not None:
        weight = torch.cat([lm_head, torch.full_like(markov_w2, torch.nan)], dim=1)
    return HeadWeights(weight, markov_w2, shard, transform)


def fused(
    runtime, inputs, objective, upstream=1.0, chunk_rows=4, compile=False, transforms=NEITHER
):
    """One rank's part."""
    of_draft, of_target = (LogitTransform(*one) for one in transforms)
    shard, lm_head, markov_w2 = shard_of(inputs, runtime.tp_group)
    leaves = leaf_copies({**inputs, "markov_w2": markov_w2})
    head = head_of(shard, lm_head, leaves["markov_w2"], of_draft)
    head_loss = HeadLoss(head, objective, chunk_rows, compile, of_target, tp_group=runtime.tp_group)
    rest = (inputs[name] for name in ("target_hidden", "labels", "weights"))
    result = head_loss(leaves["hidden"], leaves["latent"], *rest)
    (result.loss * upstream).backward()
    return results(result.loss, result.terms, leaves)


def compare(ranks, expected, vocab_size, rtol, atol):
    for name in ("loss", *TERMS, "hidden", "latent"):
        for got in ranks:
            if got[name] is None or expected[name] is None:
                assert got[name] is expected[name], name
                continue
            torch.testing.assert_close(
                got[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    if expected["markov_w2"] is not None:
        w2 = torch.cat([got["markov_w2"] for got in ranks])
        torch.testing.assert_close(w2[:vocab_size], expected["markov_w2"], rtol=rtol, atol=atol)
        assert not w2[vocab_size:].any(), "padded rows must get no gradient"


ALL = Objective(**{name: 0.3 + 0.1 * i for i, name in enumerate(TERMS)})
OBJECTIVES = {
    "paper": PAPER,
    "CE": Objective(ce=1.0),
    "L1": Objective(ce=0.0, l1=1.0),
    "KL": Objective(ce=0.0, kl=1.0),
    "reverse KL": Objective(reverse_kl=1.0),
    "JS": Objective(js=1.0),
    "Renyi": Objective(renyi_half=1.0),
    "LK-alpha": Objective(lk_alpha=1.0),
    "LK-hybrid": Objective(lk_hybrid=1.0),
    "all": ALL,
    "target's labels": Objective(ce=0.1, l1=0.9, labels_from_target=True),
    "all, target's labels": replace(ALL, labels_from_target=True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_plain_loss(pool, name, tp):
    inputs, objective = make_inputs(61, torch.float32), OBJECTIVES[name]
    expected = plain(inputs, objective, upstream=0.37)
    for rows in (1, 4, 100):
        got = pool.run(
            fused,
            world=tp,
            tp=tp,
            inputs=inputs,
            objective=objective,
            upstream=0.37,
            chunk_rows=rows,
        )
        compare(got, expected, 61, rtol=1e-5, atol=1e-6)


TRANSFORMS = {
    "scaled": ((0.25, None), (3.0, None)),
    "capped": ((1.0, 2.0), (1.0, 3.0)),
    "draft capped": ((1.0, 1.5), (1.0, None)),
    "target scaled and capped": ((1.0, None), (0.5, 2.5)),
    "both of both": ((0.5, 1.5), (2.0, 4.0)),
}
"""Of logits with a standard deviation of 2."""


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_and_capped_logits_equal_the_plain_loss(pool, transform, dtype, tp):
    """Every term, several chunkings, with and without a Markov head."""
    exact = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-11, atol=1e-12)
    transforms = TRANSFORMS[transform]
    names = ["all", "all, target's labels"] if dtype == torch.float64 else ["CE", "L1", "all"]
    for name, rows, with_latent in zip(names, (4, 100, 1), (True, False, True), strict=False):
        inputs = make_inputs(61, dtype, with_latent=with_latent)
        arguments = dict(objective=OBJECTIVES[name], upstream=0.37, transforms=transforms)
        got = pool.run(fused, world=tp, tp=tp, inputs=inputs, chunk_rows=rows, **arguments)
        compare(got, plain(inputs, **arguments), 61, **exact)


INPUTS = {
    "no padding": dict(vocab_size=64),
    "no target": dict(vocab_size=61),
    "no Markov head": dict(vocab_size=61, with_latent=False),
    "one entry a shard, padded": dict(vocab_size=13),
    "no row": dict(vocab_size=61, rows=0),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_every_kind(pool, name, tp):
    inputs = make_inputs(dtype=torch.float32, **INPUTS[name])
    objective = ALL
    if name == "no target":
        inputs["target_hidden"], objective = None, Objective(ce=1.0)
    got = pool.run(fused, world=tp, tp=tp, inputs=inputs, objective=objective)
    compare(got, plain(inputs, objective), INPUTS[name]["vocab_size"], rtol=1e-5, atol=1e-6)


def whole_result(ranks, vocab_size):
    w2 = torch.cat([got["markov_w2"] for got in ranks])[:vocab_size]
    return {**ranks[0], "markov_w2": w2}


@pytest.mark.parametrize("name", ["paper", "all", "capped"])
def test_bfloat16(pool, name, tp):
    """Logits rounded to 8 bits move every result, and a sign of p - q where both are near: so the
    measure is the plain bf16 loss, which must not be nearer to the exact result by more than chance
    allows. 1.5: the two round at different places."""
    inputs, capped = make_inputs(61, torch.bfloat16, rows=64), name == "capped"
    objective = OBJECTIVES["all" if capped else name]
    transforms = TRANSFORMS["both of both"] if capped else NEITHER
    precise = {
        name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    arguments = dict(objective=objective, transforms=transforms)
    exact, rounded = plain(precise, **arguments), plain(inputs, **arguments)
    got = pool.run(fused, world=tp, tp=tp, inputs=inputs, chunk_rows=24, **arguments)
    for key, value in whole_result(got, 61).items():
        if value is None:
            continue
        ours, theirs = ((x.float() - exact[key]).norm() for x in (value, rounded[key]))
        assert ours <= 1.5 * theirs + 1e-3 * exact[key].norm(), f"{key}: {ours} > {theirs}"


@pytest.mark.parametrize("name", ["paper", "all"])
def test_extreme_logits_stay_finite(pool, name, tp):
    """Logits of some 1e4: one-hot distributions, probabilities that underflow."""
    inputs, objective = make_inputs(61, torch.float32, kind="extreme"), OBJECTIVES[name]
    expected = plain(inputs, objective)
    got = pool.run(fused, world=tp, tp=tp, inputs=inputs, objective=objective)
    for key, value in got[0].items():
        assert value is None or torch.isfinite(value).all(), key
    torch.testing.assert_close(got[0]["l1"], expected["l1"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[0]["ce"], expected["ce"], rtol=1e-4, atol=1e-2)


def one_hot_case(disjoint):
    """Draft and target each sure of one token: the same one, or another."""
    inputs = make_inputs(8, torch.float32, with_latent=False)
    inputs["lm_head"] = torch.eye(8, HIDDEN) * 100
    inputs["hidden"] = torch.eye(HIDDEN)[torch.zeros(ROWS, dtype=torch.long)]
    inputs["target_hidden"] = torch.eye(HIDDEN)[torch.full((ROWS,), int(disjoint))]
    return inputs


ONE_HOT = {
    "same": dict.fromkeys(TERMS[1:], 0.0),
    "disjoint": {"l1": 2, "kl": 100, "reverse_kl": 100, "js": math.log(2)}
    | {"renyi_half": 100 - 2 * math.log(2), "lk_alpha": -math.log(1e-5), "lk_hybrid": 100},
}


@pytest.mark.parametrize("case", ONE_HOT)
def test_disjoint_and_identical_one_hot_distributions(pool, case, tp):
    objective, inputs = replace(ALL, ce=0.0), one_hot_case(case == "disjoint")
    got = pool.run(fused, world=tp, tp=tp, inputs=inputs, objective=objective)
    for name, value in ONE_HOT[case].items():
        torch.testing.assert_close(got[0][name], torch.full((ROWS,), float(value)), msg=name)
    assert got[0]["hidden"].isfinite().all()
    if case == "same":
        nothing = torch.zeros_like(got[0]["hidden"])  # rows of the LM head are 100
        torch.testing.assert_close(got[0]["hidden"], nothing, rtol=0, atol=1e-4)
    else:
        alone = Objective(lk_alpha=1.0)
        (first, *_) = pool.run(fused, world=tp, tp=tp, inputs=inputs, objective=alone)
        assert not first["hidden"].any(), "LK-alpha is constant below its smallest accept rate"


def test_identical_distributions_of_many_tokens(pool, tp):
    inputs = make_inputs(61, torch.float32)
    inputs["target_hidden"] = inputs["hidden"]
    inputs["markov_w2"] = torch.zeros_like(inputs["markov_w2"])
    got = pool.run(fused, world=tp, tp=tp, inputs=inputs, objective=ALL)
    for name in TERMS[1:]:
        torch.testing.assert_close(got[0][name], torch.zeros(ROWS), rtol=0, atol=3e-6)


SMOOTH = replace(ALL, lk_hybrid=0.0)
"""Not the hybrid: its gradient takes a factor for a constant that is none."""


def smooth_check(runtime, objective, leaves=("hidden", "latent"), transforms=NEITHER):
    """gradcheck of this rank's inputs; away from p = q, where L1 has no derivative."""
    inputs = make_inputs(61, torch.float64)
    shard, lm_head, markov_w2 = shard_of(inputs, runtime.tp_group)
    inputs |= {"markov_w2": markov_w2, "weights": inputs["weights"].double()}

    def loss(*values):
        given = inputs | dict(zip(leaves, values, strict=True))
        of_draft, of_target = (LogitTransform(*one) for one in transforms)
        head = head_of(shard, lm_head, given["markov_w2"], of_draft)
        names = ("hidden", "latent", "target_hidden", "labels", "weights")
        head_loss = HeadLoss(head, objective, 4, False, of_target, tp_group=runtime.tp_group)
        return head_loss(*(given[name] for name in names)).loss

    values = [inputs[name].requires_grad_() for name in leaves]
    return torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-6, rtol=1e-5)


def test_gradcheck_of_capped_logits(pool):
    """Of hidden and latents on one rank: the cap is between them."""
    arguments = dict(objective=SMOOTH, transforms=TRANSFORMS["both of both"])
    assert pool.run(smooth_check, world=1, tp=1, **arguments) == [True]


@pytest.mark.parametrize(
    "name, size", [("CE", 1), ("L1", 1), ("KL", 1), ("smooth", 1), ("smooth", 2)]
)
def test_gradcheck(pool, name, size):
    """Each term by itself on one rank; that its gradients are those of one rank is shown above."""
    objective = SMOOTH if name == "smooth" else OBJECTIVES[name]
    assert all(pool.run(smooth_check, world=size, tp=size, objective=objective))


def test_gradcheck_of_w2(pool):
    """On one rank; that every shard's gradient is its part of the whole is shown above."""
    arguments = dict(objective=SMOOTH, leaves=["markov_w2"])
    assert pool.run(smooth_check, world=1, tp=1, **arguments) == [True]


COMPILED = {
    "all": (OBJECTIVES["all"], torch.float32),
    "target's labels": (OBJECTIVES["target's labels"], torch.float32),
    "no target": (OBJECTIVES["CE"], torch.float32),
    "bf16": (OBJECTIVES["all"], torch.bfloat16),
    "capped": (OBJECTIVES["all"], torch.float32),
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    "name, size, chunk",
    [
        ("all", 1, 4),
        ("no target", 1, 11),
        ("all", 2, 11),
        ("target's labels", 2, 11),
        ("bf16", 2, 11),
        ("capped", 2, 4),
    ],
)
def test_compiled_passes(pool, name, size, chunk):
    """Eleven rows; in chunks of four the last one has another number of rows."""
    objective, dtype = COMPILED[name]
    inputs = make_inputs(61, dtype)
    if not objective.needs_target_logits:
        inputs["target_hidden"] = None
    transforms = TRANSFORMS["both of both"] if name == "capped" else NEITHER
    arguments = dict(inputs=inputs, objective=objective, chunk_rows=chunk, transforms=transforms)
    got = pool.run(fused, world=size, tp=size, compile=True, **arguments)
    if dtype == torch.float32:
        expected = plain(inputs, objective, transforms=transforms)
        compare(got, expected, 61, rtol=1e-5, atol=1e-6)
        return
    eager = pool.run(fused, world=size, tp=size, **arguments)
    # One rounding of a bf16 gradient apart: the compiler may order the operations otherwise.
    compare(got, whole_result(eager, 61), 61, rtol=2**-6, atol=2e-3)


def test_all_chunk_sizes_share_few_compilations(monkeypatch):
    """More than PyTorch's limit of eight would be an error. Without a compiler: its shapes only."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    statistics = logit_terms.compiled.__wrapped__(logit_terms.statistics)
    for rows in range(1, 20):
        u, columns = torch.randn(rows, 61), torch.zeros(rows, dtype=torch.long)
        expected = logit_terms.statistics(u, u, columns, PAPER)
        torch.testing.assert_close(statistics(u, u, columns, PAPER), expected)


def test_row_weights_are_not_rounded_to_the_gradients_type(pool):
    """1 + 2^-9 is no bf16 number: rounded to 1 it would leave every gradient as it was."""
    inputs = make_inputs(61, torch.bfloat16)
    inputs["weights"] = torch.ones(ROWS)
    (one,) = pool.run(fused, world=1, tp=1, inputs=inputs, objective=PAPER)
    inputs["weights"] = torch.full((ROWS,), 1.003)
    (weighted,) = pool.run(fused, world=1, tp=1, inputs=inputs, objective=PAPER)
    for name in ("hidden", "latent"):
        assert torch.equal(weighted[name], (one[name].float() * 1.003).bfloat16())


def test_kl_of_bfloat16_logits_far_apart():
    """Logits of draft and target may differ by an offset that means nothing; t - u in bf16 would
    be known to 1/8 only."""
    generator = torch.Generator().manual_seed(3)
    u, t = (torch.randn(ROWS, 61, generator=generator) for _ in range(2))
    u, t = u.bfloat16(), (t + 30).bfloat16()
    p, q = (x.float().log_softmax(dim=-1) for x in (u, t))
    expected = (q.exp() * (q - p)).sum(dim=-1)
    columns = torch.zeros(ROWS, dtype=torch.long)
    *_, kl = logit_terms.all_passes(u, t, columns, Objective(ce=0.0, kl=1.0), False)
    torch.testing.assert_close(kl, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("term", [dict(l1=1.0), dict(kl=1.0), dict(labels_from_target=True)])
def test_a_missing_target_is_an_error(term):
    inputs = {**make_inputs(61, torch.float32), "target_hidden": None}
    names = ("hidden", "latent", "target_hidden", "labels", "weights")
    head_loss = HeadLoss(None, Objective(ce=1.0, **term), 1, tp_group=None)
    with pytest.raises(ValueError, match="target_hidden is missing"):
        head_loss(*(inputs[name] for name in names))


def accept_rate_without_target(runtime):
    inputs = make_inputs(61, torch.float32, with_latent=False)
    shard, lm_head, _ = shard_of(inputs, runtime.tp_group)
    head = HeadWeights(lm_head, None, shard)
    head_loss = HeadLoss(head, Objective(ce=1.0), 4, tp_group=runtime.tp_group)
    return head_loss(inputs["hidden"], None, None, inputs["labels"], inputs["weights"]).accept_rate


def test_no_accept_rate_without_a_target(pool):
    with pytest.raises(AssertionError, match="accept rate needs target_hidden"):
        pool.run(accept_rate_without_target, world=1, tp=1)


def rows_of(vocab_local, dtype=torch.float32, with_target=True, capped=False, **loss):
    how = dict(with_target=with_target, capped=capped)
    return chunk_rows(LossConfig(**loss), vocab_local, dtype, **how)


def test_chunk_rows_come_from_the_budget():
    assert rows_of(2**17, memory_budget_mb=256) == 256  # 1 MiB a row: draft and target in fp32
    assert rows_of(2**17, memory_budget_mb=256, with_target=False) == 512
    assert rows_of(2**17, memory_budget_mb=256, dtype=torch.bfloat16) == 512
    assert rows_of(2**16, memory_budget_mb=384, capped=True) == 512, "three tensors of logits"
    assert rows_of(2**15, memory_budget_mb=256) == 1024
    assert rows_of(2**17, memory_budget_mb=200) == 128  # 200, in steps of 128
    assert rows_of(2**17, memory_budget_mb=100) == 100
    assert rows_of(2**17, memory_budget_mb=10) == 10
    assert rows_of(2**17, memory_budget_mb=10, chunk_rows=77) == 77
    with pytest.raises(ConfigError, match=r"memory_budget_mb \(1\) must hold .*: 4.0 MiB"):
        rows_of(2**19, memory_budget_mb=1)


def logit_tensors(runtime):
    """Rows of every tensor that has a column for each vocabulary entry."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, columns = [], 64 // runtime.tp_group.size()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            weights = function is torch.ops.aten.t.default
            if isinstance(out, torch.Tensor) and out.shape[1:] == (columns,) and not weights:
                rows.append(len(out))
            return out

    inputs = make_inputs(64, torch.float32)
    with Watch():
        fused(runtime, inputs, PAPER, chunk_rows=4)
    return rows


@pytest.mark.parametrize("size", [1, 2])
def test_logits_exist_for_one_chunk_only(pool, size):
    for rows in pool.run(logit_tensors, world=size, tp=size):
        assert max(rows) == 4, "of 11 rows"
