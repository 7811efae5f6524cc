"""The plan's formulas are held to what is allocated, saved and sent."""

from dataclasses import replace
from itertools import product

import benchmark_activations
import pytest
import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.planning.activations import DraftPass, kept_bytes
from dspark_megatron.planning.loss_memory import HeadLossSize, head_loss_parts
from support.shapes import SHAPE
from support.tool_runs import figures, run_tool
from support.training_runs import torchrun

WIDE = replace(
    SHAPE,
    hidden_size=128,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    vocab_size=512,
    max_position_embeddings=1024,
    block_size=7,
    markov_rank=32,
)
TOKENS, ANCHORS = 501, 37


def kept(runtime, shape, dtype):
    """Counted bytes by (sequence_parallel, recompute)."""
    from step_variants import build_draft

    counted = {}
    for split, recompute in product((False, True), repeat=2):
        options = dict(sequence_parallel=split, recompute_activations=recompute)
        draft = build_draft(shape, runtime, getattr(torch, dtype), **options)
        counted[split, recompute] = benchmark_activations.saved_bytes(draft, TOKENS, ANCHORS)
    return counted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head, layers", [("vanilla", 1), ("vanilla", 3), ("gated", 1), ("rnn", 1)])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_kept_activations_are_those_that_autograd_saves(pool, tp, head, layers, dtype):
    shape = replace(WIDE, num_layers=layers, markov_head_type=head)
    for counted in pool.run(kept, world=tp, tp=tp, shape=shape, dtype=dtype):
        for (split, recompute), size in counted.items():
            one = DraftPass(
                samples=1,
                seq_length=TOKENS,
                num_anchors=ANCHORS,
                itemsize=getattr(torch, dtype).itemsize,
                tp_size=tp,
                sequence_parallel=split and tp > 1,
                recompute=recompute,
            )
            assert kept_bytes(shape, one) == pytest.approx(size, rel=0.05), (split, recompute)


@pytest.mark.slow
def test_the_peak_of_the_target(tmp_path):
    """Measured by the benchmark. A shared target's layer counts a copy more than a CPU keeps."""
    file = tmp_path / "target.json"
    sizes = ["--hidden", 256, "--ffn", 896, "--families", "llama", "mixtral"]
    run_tool(*torchrun(2, "tools/benchmark_target.py", *sizes, "--json", file))
    rows = figures(file)
    assert {(row["tp"], row["shared by"], row["pieces"]) for row in rows} == {
        *((1, 1, 1), (1, 2, 1), (1, 1, 4), (2, 1, 1), (2, 1, 4))
    }
    for row in rows:
        assert 0.95 < row["planned / measured"] < (1.3 if row["shared by"] > 1 else 1.15), row


LOSS = dict(rows=1024, vocab=16384, hidden=256, rank=128)
BUDGETS = {"float32": 32, "bfloat16": 24}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BUDGETS)
def test_the_peak_of_the_loss(tmp_path, dtype):
    """Measured by the benchmark, in processes of its own: it compares and shows what it says."""
    file = tmp_path / "loss.json"
    sizes = [part for name, size in LOSS.items() for part in (f"--{name}", size)]
    sizes += ["--dtype", dtype, "--memory-budget-mb", BUDGETS[dtype], "--rounds", 1]
    text = run_tool(*torchrun(2, "tools/benchmark_loss.py", *sizes, "--json", file))
    rows = {(row["variant"], row["tp"]): row for row in figures(file)}
    assert all(name in text for name, _ in rows)
    assert set(rows) == {
        *((name, 1) for name in ("plain", "recompute", "head_loss", "products")),
        *((name, 2) for name in ("head_loss", "products")),
    }
    for tp in (1, 2):
        measured = rows["head_loss", tp]
        assert measured["memory / plain"] < 0.5  # plain holds several [rows, vocab], ours none
        size = HeadLossSize(
            rows=LOSS["rows"],
            hidden_size=LOSS["hidden"],
            markov_rank=LOSS["rank"],
            vocab_local=LOSS["vocab"] // tp,
            dtype=getattr(torch, dtype),
            device=torch.device("cpu"),
        )
        loss = LossConfig(memory_budget_mb=BUDGETS[dtype])
        planned = sum(head_loss_parts(loss, size, with_target=True).values())
        assert planned / 2**20 == pytest.approx(measured["MiB per rank"], rel=0.15), tp
