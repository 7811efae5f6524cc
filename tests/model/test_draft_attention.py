"""Windows, causal blocks, sinks and biases: the split draft equals its plain twin in loss and every
gradient, its checkpoints move between layouts, and it drafts as it was trained."""

from dataclasses import replace

import pytest
import torch

from dspark_megatron.conversion.layouts.names import check_megatron_tensors
from dspark_megatron.shape.attention import DraftAttention
from dspark_megatron.storage.training_checkpoint import CheckpointReader
from support.draft_passes import drafted_and_trained
from support.draft_steps import assert_plain_step, step_gradients, whole
from support.shapes import SHAPE, meta_of
from support.tiny_draft import build_tiny_draft, layout_of, make_samples, sample_logits
from support.tiny_target import tiny_config
from support.training_runs import assert_same_curve, curve, run_training

BOTH = (0, 1)
ATTENTION = {
    "window": DraftAttention(window=5, sliding_layers=BOTH),
    "window of the anchor in one layer": DraftAttention(
        window=4, window_origin="anchor", sliding_layers=(1,), causal_layers=(1,)
    ),
    "causal": DraftAttention(causal_layers=BOTH),
    "sink": DraftAttention(sink=True),
    "biases": DraftAttention(biases=True),
    "all": DraftAttention(
        window=4,
        window_origin="anchor",
        sliding_layers=BOTH,
        causal_layers=BOTH,
        sink=True,
        biases=True,
    ),
    "all in one layer": DraftAttention(
        window=3, sliding_layers=(0,), causal_layers=(0,), sink=True, biases=True
    ),
}
SHAPES = {name: replace(SHAPE, attention=attention) for name, attention in ATTENTION.items()}
LAYOUTS = [
    (1, 1, 4, False, False),
    (2, 2, 1, False, True),
    (2, 2, 4, True, False),
    (4, 4, 2, True, True),
    (4, 2, 1, True, True),
]
"""World size, tensor-parallel size, micro-batch size, sequence parallelism, recompute."""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world, tp, size, split, recompute", LAYOUTS)
def test_step_equals_the_plain_twin(pool, name, world, tp, size, split, recompute):
    options = dict(sequence_parallel=split, recompute_activations=recompute)
    arguments = dict(shape=SHAPES[name], micro_batch_size=size, **options)
    assert_plain_step(pool.run(step_gradients, world=world, tp=tp, **arguments), SHAPES[name])


def hidden_states(runtime, shape, backend="sdpa", trimmed=True):
    """Of a sample's blocks; an anchor stands at its start and one at its end."""
    samples = make_samples(shape, lengths=(20,))
    model = build_tiny_draft(runtime, shape, attention_backend=backend)
    anchors = torch.tensor([0, 4, 5, 16, 18])
    return sample_logits(model, samples.taps[0], samples.input_ids[0], anchors, trimmed=trimmed)[0]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_draft_on_flex_equals_one_on_groups(pool, name, tp):
    arguments = dict(world=tp, tp=tp, shape=SHAPES[name])
    [flex, *_] = pool.run(hidden_states, backend="flex", **arguments)
    [groups, *_] = pool.run(hidden_states, **arguments)
    torch.testing.assert_close(flex, groups, rtol=1e-5, atol=2e-6)


def test_context_outside_of_all_windows_is_not_needed(pool):
    arguments = dict(world=1, tp=1, shape=SHAPES["window"])
    [seen] = pool.run(hidden_states, **arguments)
    [everything] = pool.run(hidden_states, trimmed=False, **arguments)
    torch.testing.assert_close(seen, everything, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tp", [1, 2])
def test_logits_of_decoding_are_those_of_training(pool, name, tp):
    for found, wanted, held in pool.run(drafted_and_trained, world=tp, tp=tp, shape=SHAPES[name]):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        reach = SHAPES[name].attention.reach(SHAPE.num_layers)
        assert held == (reach or 14), "tokens behind the last window are dropped"


def save_draft(runtime, folder, shape):
    from dspark_megatron.run.checkpoints.saving import save_checkpoint
    from dspark_megatron.run.checkpoints.state import RunState

    draft = build_tiny_draft(runtime, shape)
    saved = save_checkpoint(folder, RunState(1, 8), meta_of(shape), draft, None, keep_last=1)
    return saved, gathered(runtime, draft)


def load_draft(runtime, folder, shape):
    from dspark_megatron.run.checkpoints.loading import load_checkpoint

    draft = build_tiny_draft(runtime, shape)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    load_checkpoint(folder, draft, optimizer=None)
    return gathered(runtime, draft)


def gathered(runtime, draft):
    trained = {n: p.detach() for n, p in draft.named_parameters() if p.requires_grad}
    layout, rank = layout_of(draft), runtime.tp_group.rank()
    return {"weights": trained, "layout": layout, "tp_rank": rank, "dp_rank": 0}


def test_a_checkpoint_moves_to_another_tensor_parallel_size(pool, tmp_path):
    """And has what the name table says."""
    shape = SHAPES["all"]
    saved = pool.run(save_draft, world=2, tp=2, folder=tmp_path, shape=shape)
    folder = saved[0][0]
    reader = CheckpointReader(folder)
    assert reader.shape == shape
    check_megatron_tensors(shape, reader.names(), "it")
    loaded = pool.run(load_draft, world=4, tp=4, folder=folder, shape=shape)
    expected = whole([rank for _, rank in saved], "weights", shape)
    got = whole(loaded, "weights", shape)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    sinks = expected["layers.1.self_attn.attention_sink_bias"]
    assert len(sinks) == SHAPE.num_attention_heads and len(sinks.unique()) == len(sinks)


def test_sinks_and_biases_start_at_zero(pool):
    for name, parameter in pool.run(fresh, world=1, tp=1, shape=SHAPES["all"])[0].items():
        assert not parameter.any() if name.endswith("bias") else parameter.any(), name


def fresh(runtime, shape):
    from dspark_megatron.model.draft_model import DSparkDraftModel

    place = dict(tp_group=runtime.tp_group, device=runtime.device)
    model = DSparkDraftModel(shape, **place, params_dtype=torch.float32)
    model.init_weights(seed=1, std=0.1)
    return {n: p.detach() for n, p in model.named_parameters() if "self_attention" in n}


def test_a_run_is_the_same_at_every_layout_and_resumes(pool, tiny_run, tmp_path):
    attention = {"window": 6, "sliding_layers": [1], "causal": "sliding", "sink": True}

    def run(output, tp, minutes_ago=(), **changed):
        config = tiny_config(
            tiny_run,
            model={"attention": {**attention, "biases": True, **changed}},
            train={"output_dir": str(output), "iterations": 3, "exit_duration_minutes": 1},
            parallel={"tensor_parallel": tp, "sequence_parallel": tp > 1},
        )
        pool.run(run_training, world=2, tp=tp, config=config, minutes_ago=minutes_ago)
        return curve(output)

    unbroken = run(tmp_path / "unbroken", 1)
    stopped = run(tmp_path / "stopped", 2, minutes_ago=[2, 2])
    assert_same_curve(stopped, unbroken[:1])
    assert_same_curve(run(tmp_path / "stopped", 2), unbroken)
    with pytest.raises(AssertionError, match="shape.attention.*window: 6 there, 7 here"):
        run(tmp_path / "stopped", 2, window=7)
