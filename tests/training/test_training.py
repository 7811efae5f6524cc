"""Whole runs: the draft learns, and the curve does not depend on the layout."""

import shutil

import pytest

from support.tiny_target import tiny_config
from support.training_runs import assert_same_curve, curve, run_training


def test_training_learns(unbroken):
    rows = curve(unbroken)
    assert len(rows) == 20
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["tau"] > rows[0]["tau"]


# World size, tensor-parallel size, sequence parallel, micro-batch size.
LAYOUTS = [(2, 2, False, 2), (2, 1, False, 1), (4, 2, True, 1), (4, 4, False, 4)]


@pytest.mark.parametrize("world, tp, sequence_parallel, micro_batch_size", LAYOUTS)
def test_the_curve_does_not_depend_on_the_layout(
    pool, tiny_run, unbroken, tmp_path, world, tp, sequence_parallel, micro_batch_size
):
    settings = {"output_dir": str(tmp_path), "micro_batch_size": micro_batch_size}
    parallel = {"tensor_parallel": tp, "sequence_parallel": sequence_parallel}
    config = tiny_config(tiny_run, train=settings, parallel=parallel)
    pool.run(run_training, world=world, tp=tp, config=config)
    assert_same_curve(curve(tmp_path), curve(unbroken))


BY_ACCEPTANCE = {
    "dpace": {"weighting": {"name": "dpace"}, "confidence_stop_gradient": True},
    "dpard": {
        "weighting": {"name": "dpard", "alpha": 0.3},
        "confidence_weights": "reach",
        "normalization": "global_samples",
        "supervised_slots": "all",
    },
}


@pytest.mark.parametrize("name", BY_ACCEPTANCE)
def test_weights_by_acceptance_do_not_depend_on_the_layout(pool, tiny_run, tmp_path, name):
    """Nor on a break: the second run goes on from the first one's third step."""
    loss = {**BY_ACCEPTANCE[name], "chunk_rows": 7}

    def run(folder, world, tp, size, **more):
        train = {"output_dir": str(tmp_path / folder), "micro_batch_size": size, **more}
        train |= {"iterations": 6, "save_every": 3}
        parallel = {"tensor_parallel": tp}
        config = tiny_config(tiny_run, train=train, loss=loss, parallel=parallel)
        pool.run(run_training, world=world, tp=tp, config=config)
        return curve(tmp_path / folder)

    whole = run("whole", 1, 1, 4)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    assert_same_curve(run("broken", 4, 2, 1, resume_from=3)[-3:], whole[3:])
    assert_same_curve(run("other", 2, 2, 2), whole)


def test_bfloat16_with_fp32_main_weights_follows_float32(pool, tiny_run, unbroken, tmp_path):
    """bf16 has 8 bits: losses near the fp32 ones, on one rank and with a sharded optimizer."""
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path), "dtype": "bfloat16"})
    pool.run(run_training, world=2, tp=1, config=config)
    for mine, theirs in zip(curve(tmp_path), curve(unbroken), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def layers_of_the_target(runtime, config):
    """Train; how many decoder layers the target ran."""
    from dspark_megatron.run import states as states_source

    build, targets = states_source.build_target, []

    def kept(*arguments, **options):
        targets.append(build(*arguments, **options))
        return targets[0]

    states_source.build_target = kept
    try:
        run_training(runtime, config)
    finally:
        states_source.build_target = build
    return len(targets[0].layers)


@pytest.mark.parametrize("has_head", [False, True])
def test_cross_entropy_alone_needs_no_target_logits(pool, tiny_run, tmp_path, has_head):
    """At two layouts, and beside a weight of L1 that is next to nothing."""
    alone = {"l1_loss_alpha": 0.0, "confidence_head_alpha": 0.0}
    runs = [(1, alone, 3), (2, alone, 3), (1, {**alone, "l1_loss_alpha": 1e-12}, 4)]
    curves = []
    for i, (tp, loss, layers) in enumerate(runs):
        config = tiny_config(
            tiny_run,
            model={"enable_confidence_head": has_head, "confidence_head_with_markov": has_head},
            loss=loss,
            train={"output_dir": str(tmp_path / str(i)), "iterations": 6},
            parallel={"tensor_parallel": tp},
        )
        assert pool.run(layers_of_the_target, world=tp, tp=tp, config=config) == [layers] * tp
        curves.append(curve(tmp_path / str(i)))
    assert "tau" not in curves[0][0] and "tau" in curves[2][0]
    for other in curves[1:]:
        for mine, theirs in zip(curves[0], other, strict=True):
            for name in ("loss", "ce_loss", "grad_norm"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert curves[0][-1]["loss"] < curves[0][0]["loss"]


def test_tensorboard_has_the_scalars(unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(unbroken / "tensorboard"))
    board.Reload()
    losses = [event.value for event in board.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in curve(unbroken)], rel=1e-6)
    assert "accept_rate/2" in board.Tags()["scalars"]
