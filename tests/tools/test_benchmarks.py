"""The benchmarks run, measure what they say, and compare equal things. No time is ever tested."""

from pathlib import Path

import benchmark_activations
import benchmark_loss
import benchmark_packing
import benchmark_save
import benchmark_step
import benchmark_target_providers
import benchmark_window
import benchmarking
import pytest
import torch
import torch.distributed as dist
from loss_variants import OBJECTIVES
from transformers import AutoModelForCausalLM

from dspark_megatron.config.objective.terms import TERMS
from support.tiny_target import VOCAB_SIZE, tiny_config
from support.tool_runs import figures, run_tool

CPU = torch.device("cpu")
RENYI = OBJECTIVES["renyi_half"]
SMALL = "--hidden 32 --ffn 48 --heads 4 --kv-heads 2 --head-dim 8 --rank 8 --rounds 1".split()


KNOWN_PATTERN = """
import sys, torch
sys.path.insert(0, "tools")
import benchmarking

def two_of_three_at_a_time():
    a, b = (torch.ones(10 * benchmarking.MIB) for _ in range(2))
    del a
    torch.ones(10 * benchmarking.MIB)
    del b

benchmarking.give_tensors_own_pages()
print(benchmarking.peak_memory(two_of_three_at_a_time, torch.device("cpu")))
"""


def test_peak_memory_of_a_known_pattern():
    """In a process of its own, as the measure asks for: what other tests have freed here may be
    used again without counting."""
    peak = int(run_tool("-c", KNOWN_PATTERN))
    assert peak == pytest.approx(80 * benchmarking.MIB, rel=0.05)


def check_wrong_gradients(runtime):
    args = benchmark_loss.parse_arguments("--rows 20 --vocab 64 --hidden 8 --rank 4".split())
    problem = benchmark_loss.Problem(args, runtime.tp_group, runtime.device)
    hidden, latent, w2 = expected = problem.plain()
    benchmark_loss.check_gradients(problem, problem.head_loss(), expected, "float32")
    with pytest.raises(ValueError, match="gradient of w2 at TP 1"):
        benchmark_loss.check_gradients(problem, (hidden, latent, 1.01 * w2), expected, "float32")
    other, expected = problem.head_loss(case=OBJECTIVES["dpard"]), problem.plain(case=RENYI)
    with pytest.raises(ValueError, match="objective renyi_half: the gradient of hidden at TP 1"):
        benchmark_loss.check_gradients(problem, other, expected, "float32", "renyi_half")


def test_a_loss_with_wrong_gradients_is_not_measured(pool):
    pool.run(check_wrong_gradients, world=1, tp=1)


def objective_rows(runtime):
    sizes = "--rows 20 --vocab 64 --hidden 8 --rank 4 --chunk-rows 8 --rounds 1"
    return benchmark_loss.measure_objectives(runtime, benchmark_loss.parse_arguments(sizes.split()))


@pytest.mark.parametrize("tp", [1, 2])
def test_every_objective_beside_the_default(pool, tp):
    """measure_objectives raises where the gradients of one are not the plain ones."""
    for rows in pool.run(objective_rows, world=tp, tp=tp):
        names = [row["objective"] for row in rows]
        assert names == ["default", *TERMS[2:], "dpace", "dpard"]
        assert all(row["ms"] > 0 and row["tp"] == tp for row in rows)
        assert rows[0]["time / default"] == 1


@pytest.mark.slow
def test_step_on_synthetic_data(tmp_path):
    file = tmp_path / "step.json"
    sizes = ["--vocab", 256, "--seq-length", 48, "--num-anchors", 16, "--json", file]
    text = run_tool("tools/benchmark_step.py", *SMALL, *sizes)
    variants = ["plain", "plain, SDPA", "ours", "ours, recompute"]
    assert [row["variant"] for row in figures(file)] == variants
    assert "memory / plain" in text


def step_tables(runtime, options):
    args = benchmark_step.parse_arguments(options)
    tables = benchmark_step.make_tables(runtime, args)
    return {title: rows for title, (rows, _) in tables.items()}


def test_step_on_the_samples_of_a_config(pool, tiny_run, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(tiny_config(tiny_run).to_yaml())
    target = tiny_run["target"]["path"]
    data = ["--data", "quickstart", "--config", str(config), "--target", target, "--samples", "3"]
    sizes = ["--vocab", str(VOCAB_SIZE), "--num-anchors", "16"]
    (tables,) = pool.run(step_tables, world=1, tp=1, options=[*SMALL, *data, *sizes])
    ((title, rows),) = tables.items()
    assert "3 sample(s)" in title and "num_anchors 16" in title
    assert len(rows) == 4


def test_attention_curve(pool):
    options = ["--attention-curve", "--seq-length", "32", "--anchors", "4", "8", "16"]
    (tables,) = pool.run(step_tables, world=1, tp=1, options=[*SMALL, *options])
    curve, fit = tables.values()
    assert [row["anchors"] for row in curve] == [4, 4, 8, 8, 16, 16]
    assert [row["variant"] for row in fit] == ["ours", "dense mask"]


def window_rows(runtime):
    options = "--hidden 32 --heads 4 --kv-heads 2 --rounds 1 --seq-length 64 256 --windows 16"
    args = benchmark_window.parse_arguments([*options.split(), "--answer", "32", "--anchors", "8"])
    return benchmark_window.measure(runtime, args)


def test_context_of_a_window_does_not_grow_with_the_sample(pool):
    (rows,) = pool.run(window_rows, world=1, tp=1)
    seen = {(row["tokens"], row["window"]): row["context"] for row in rows}
    assert seen[64, "-"] < seen[64, "16"] + 32 and seen[256, "-"] > 200
    assert seen[64, "16"] == seen[256, "16"] < 48


def test_a_step_with_a_wrong_loss_is_not_measured():
    with pytest.raises(ValueError, match="'ours' is 2.0, the plain one 1.0"):
        benchmark_step.check_losses({"plain": 1.0, "ours": 2.0}, "float32")


def save_rows(runtime, folder):
    options = "--layers 1 --hidden 128 --seq-length 16 --rounds 1".split()
    args = benchmark_save.parse_arguments(options)
    return benchmark_save.measure(args, runtime, folder, distributed=False)


def test_both_kinds_of_save_write_the_same_amount(pool, tmp_path):
    (rows,) = pool.run(save_rows, world=1, tp=1, folder=tmp_path)
    assert [row["save"] for row in rows] == ["waits", "in the background"]
    assert rows[0]["checkpoint MiB"] == pytest.approx(rows[1]["checkpoint MiB"], rel=1e-3)
    assert all(0 < row["pause s"] <= row["written s"] for row in rows)


def activation_rows(runtime):
    sizes = "--hidden 64 --ffn 96 --heads 8 --kv-heads 4 --seq-length 40 --num-anchors 9".split()
    return benchmark_activations.table_rows(runtime, benchmark_activations.parse_arguments(sizes))


def test_sequence_parallel_keeps_less_for_backward(pool):
    """At TP 4 the parts that are whole without it are a quarter."""
    (whole,) = pool.run(activation_rows, world=1, tp=1)
    assert [row["recompute"] for row in whole] == ["off", "on"]
    for rows in pool.run(activation_rows, world=4, tp=4):
        assert [row["sequence parallel"] for row in rows] == ["off", "on", "off", "on"]
        for plain, split in zip(rows[::2], rows[1::2], strict=True):
            assert split["MiB"] < 0.75 * plain["MiB"]
        assert all(row["MiB"] < whole[0]["MiB"] for row in rows)


def provider_figures(runtime, folder):
    """Of both providers: the memory, and a row of the table."""
    tool = benchmark_target_providers
    options = [*"--hidden 32 --ffn 64 --heads 4 --kv-heads 2 --seq-length 16".split()]
    config = tool.family_config("qwen3_moe", tool.parse_arguments(options))
    if runtime.is_main:
        AutoModelForCausalLM.from_config(config).save_pretrained(Path(folder) / "qwen3_moe")
    dist.barrier()
    targets = tool.both("qwen3_moe", 2, runtime, Path(folder))
    found = tool.memory(targets, torch.arange(16)[None], runtime.device)
    return tool.row({"tp": 2}, found["weights"], benchmarking.MIB)


def test_target_providers_side_by_side(pool, tmp_path):
    """The same weights take the same memory; other states are an error."""
    for row in pool.run(provider_figures, world=2, tp=2, folder=str(tmp_path)):
        assert row["megatron"] == row["huggingface"] > 0 and row["megatron / huggingface"] == 1


def test_kept_for_backward_is_a_straight_line_in_the_length(pool):
    """With recomputed layers nothing but the context grows, whatever the number of anchors."""
    slopes = [
        [row["KiB a token more"] for row in pool.run(lengths, world=1, tp=1, anchors=n)[0]]
        for n in (16, 64)
    ]
    assert slopes[0] == pytest.approx([slopes[0][0]] * 2, rel=1e-6)
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-6)


def lengths(runtime, anchors):
    sizes = f"--seq-length 512 2048 8192 --hidden 64 --ffn 96 --num-anchors {anchors}"
    args = benchmark_activations.parse_arguments(sizes.split())
    rows = benchmark_activations.table_rows(runtime, args)
    benchmark_activations.compare(rows)
    return [row for row in rows if row["recompute"] == "on" and row["tokens"] > 512]


def test_packing_is_compared_on_the_same_samples(pool, tiny_run):
    train = {"micro_batch_size": 2, "global_batch_size": 8}
    config = tiny_config(tiny_run, train=train)
    rows = pool.run(packing_rows, world=1, tp=1, config=config)[0]
    padding = {row["variant"]: row["padding"] for row in rows}
    assert list(padding) == list(benchmark_packing.VARIANTS)
    assert padding["packed"] < padding["as they come"] > padding["grouped by length"]
    assert rows[0]["tokens/s, ratio"] == 1
    with pytest.raises(ValueError, match="the loss 'packed' is 2.0"):
        benchmark_packing.check_losses({"as they come": 1.0, "packed": 2.0})


def packing_rows(runtime, config):
    return benchmark_packing.measure(benchmark_packing.Variants(config, runtime, steps=2), rounds=1)
