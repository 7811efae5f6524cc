"""The plan is held to what is allocated and sent: of the draft by real steps on the CPU."""

from dataclasses import replace

import benchmark_plan
import pytest

from dspark_megatron.config.attention import AttentionConfig
from dspark_megatron.planning.observing.gpu_kernels import gpu_kernels
from dspark_megatron.planning.on_paper.observation import observe_on_paper
from dspark_megatron.shape.attention import DraftAttention
from support.tool_runs import figures, run_tool
from support.training_runs import torchrun

SIZES = benchmark_plan.Sizes(hidden=128, vocab=4096, tokens=256, anchors=24)
LAYOUTS = [
    (1, 1, "plain"),
    (1, 1, "bfloat16"),
    (1, 1, "recompute"),
    (1, 1, "no heads"),
    (2, 1, "whole optimizer"),
    (2, 1, "overlap"),
    (4, 2, "Muon"),
    (2, 2, "rnn head"),
    (2, 2, "sequence parallel, recompute"),
    (1, 1, "windows"),
    (2, 2, "one window, sinks, biases"),
    (4, 2, "KL"),
    (2, 2, "other distances"),
    (4, 2, "sequence parallel"),
    (4, 4, "gated head"),
]
"""Ranks, tensor-parallel ones, variant."""


def measured(runtime, variant):
    sizes = runtime.tp_group.size(), runtime.dp_group.size()
    return benchmark_plan.measured(runtime, benchmark_plan.step_plan(SIZES, *sizes, variant))


@pytest.mark.parametrize("world, tp, variant", LAYOUTS)
def test_a_step_takes_and_sends_what_the_plan_says(pool, world, tp, variant):
    """Memory within a twentieth, and every byte of every kind of collective and group."""
    plan = benchmark_plan.planned(benchmark_plan.step_plan(SIZES, tp, world // tp, variant))
    ranks = pool.run(measured, world=world, tp=tp, variant=variant)
    for real in ranks[:1] if variant == "Muon" else ranks:  # the first owns most
        benchmark_plan.check(plan, real, variant)
        assert (world > 1) == bool(real.sent)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_the_work_of_attention_is_that_of_the_windows(backend):
    """Of a draft's step with 256 anchors in 2,048 and in 4,096 tokens, projections included."""

    def flops(tokens, window):
        sizes = benchmark_plan.Sizes(128, 4096, tokens, 256)
        plan = benchmark_plan.step_plan(sizes, 1, 1, "plain")
        attention = AttentionConfig(window=window)
        model = replace(plan.config.model, attention_backend=backend, attention=attention)
        shape = replace(plan.shape, attention=DraftAttention.of(attention, plan.shape.num_layers))
        plan = replace(plan, config=replace(plan.config, model=model), shape=shape)
        return observe_on_paper(plan, gpu_kernels).micro_batch["draft"].flops

    full, windowed, narrow = ([flops(n, w) for n in (2048, 4096)] for w in (None, 512, 128))
    assert narrow[0] < windowed[0] < full[0] and narrow[1] < windowed[1] < full[1]
    grown = [more - less for less, more in (full, windowed, narrow)]
    assert max(grown[1:]) < grown[0] / 3


def test_a_plan_that_is_not_what_happens_is_refused():
    plan = benchmark_plan.planned(benchmark_plan.step_plan(SIZES, 2, 1, "plain"))
    less = replace(plan.sent[0], handed=plan.sent[0].handed - 1)
    for wrong in (
        replace(plan, sent=(less, *plan.sent[1:])),
        replace(plan, sent=plan.sent[1:]),
        replace(plan, highest=int(plan.highest * 0.94)),
        replace(plan, held=int(plan.held * 1.06)),
    ):
        with pytest.raises(ValueError, match="planned"):
            benchmark_plan.check(wrong, plan, "plain")


@pytest.mark.slow
def test_the_peak_of_the_target(tmp_path):
    """Measured by the benchmark; in fp32, since bf16 takes minutes on some CPUs."""
    file = tmp_path / "target.json"
    sizes = ["--hidden", 256, "--ffn", 896, "--families", "llama", "--dtypes", "float32"]
    run_tool(*torchrun(2, "tools/benchmark_target.py", *sizes, "--json", file))
    rows = figures(file)
    assert {(row["tp"], row["shared by"], row["pieces"]) for row in rows} == {
        *((1, 1, 1), (1, 2, 1), (1, 1, 4), (2, 1, 1), (2, 1, 4))
    }
    for row in rows:
        assert 0.9 < row["planned / measured"] < 1.1, row  # gloo may keep what it sent


LOSS = dict(rows=512, vocab=8192, hidden=64, rank=32)


@pytest.mark.slow
def test_the_peak_of_the_loss(tmp_path):
    """Measured by the benchmark, in processes of its own: it compares and shows what it says."""
    file = tmp_path / "loss.json"
    sizes = [part for name, size in LOSS.items() for part in (f"--{name}", size)]
    sizes += ["--memory-budget-mb", 6, "--rounds", 1]
    text = run_tool(*torchrun(2, "tools/benchmark_loss.py", *sizes, "--json", file))
    rows = {(row["variant"], row["tp"]): row for row in figures(file)}
    assert all(name in text for name, _ in rows)
    assert set(rows) == {
        *((name, 1) for name in ("plain", "recompute", "head_loss", "capped", "products")),
        *((name, 2) for name in ("head_loss", "capped", "products")),
    }
    for tp in (1, 2):
        measured = rows["head_loss", tp]
        assert measured["memory / plain"] < 0.5  # plain holds several [rows, vocab], ours none
