"""Megatron-LM's `pretrain()`, from Megatron-Core's 0.19 wheel, trains a draft. What it asks a GPU
for is answered from outside."""

import contextlib
import importlib.util
import inspect
import os
import queue
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dspark_megatron.config.loading import load_config
from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.verify import verify_folder
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint
from support import megatron_on_cpu
from support.paths import ROOT
from support.pretrain_runs import (
    PARSING,
    PROVIDERS,
    STEPS,
    assert_same_steps,
    config_of,
    our_steps,
    trained,
)
from support.tiny_pretrain import OPTIMIZER, command_line

EXAMPLE = ROOT / "examples" / "megatron_lm"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None
    or importlib.util.find_spec("triton") is None,
    reason="needs Megatron-Core 0.19's wheel and triton, which it imports",
)


@contextlib.contextmanager
def as_launched(runtime, line):
    """With torchrun's environment and what a GPU would answer; and saving without a process that
    serves a queue, which would outlive a killed rank."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    place = {"RANK": str(runtime.rank), "WORLD_SIZE": str(runtime.world_size)}
    with (
        mock.patch.dict(os.environ, place),
        mock.patch.object(sys, "argv", ["pretrain_dspark.py", *line]),
        mock.patch.object(filesystem_async, "_results_queue", queue.Queue()),
        megatron_on_cpu.answers(),
    ):
        yield


@contextlib.contextmanager
def globals_of_one_run():
    """Megatron's and ours are for one run a process."""
    from megatron.core import num_microbatches_calculator, rerun_state_machine
    from megatron.training import global_vars, training

    from dspark_megatron.megatron_lm import pretraining

    rerun_state_machine.destroy_rerun_state_machine()  # of a loop that did not initialize it
    try:
        # A rank that has seen a run sums one number more at the start of the next.
        with mock.patch.dict(training._STARTUP_TIMESTAMPS):
            yield
    finally:
        pretraining._this_run.cache_clear()
        global_vars.destroy_global_vars()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        rerun_state_machine.destroy_rerun_state_machine()


def pretrain_steps(runtime, line):
    """Means and weights after each step of `pretrain()`, as the example calls it."""
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    train_step, done = training.train_step, []

    def recorded(forward_step, iterator, model, *rest, **more):
        result = train_step(forward_step, iterator, model, *rest, **more)
        means = {name: value.item() for name, value in result[0].items()}
        done.append((means, trained(unwrap_model(model[0]))))
        return result

    with (
        as_launched(runtime, line),
        globals_of_one_run(),
        mock.patch.object(training, "train_step", recorded),
    ):
        try:
            megatron_on_cpu.run_script(EXAMPLE / "pretrain_dspark.py")
        except SystemExit as end:  # of --exit-interval
            assert not end.code
    return done


@pytest.mark.parametrize("world, tp", [(1, 1), (4, 2)])
def test_pretrain_makes_the_steps_of_our_loop(pool, tiny_run, tmp_path, world, tp):
    config = config_of(tiny_run, tmp_path / "ours", 2, tp, optimizer=OPTIMIZER)
    expected = pool.run(our_steps, world=world, tp=tp, config=config)
    line = command_line(tiny_run, tmp_path / "theirs", iterations=STEPS, tp=tp)
    got = pool.run(pretrain_steps, world=world, tp=tp, line=line)
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_steps(mine, theirs, rel=2e-6, abs=2e-6)


def first_weights(runtime, config):
    from dspark_megatron.run.check import check
    from dspark_megatron.training.loop import build_run_draft

    return trained(build_run_draft(check(config, runtime.world_size), runtime, is_new=True))


def test_a_checkpoint_of_pretrain_continues_and_is_known_to_our_tools(pool, tiny_run, tmp_path):
    """It holds the draft alone. With bf16, since Megatron cannot load its distributed optimizer for
    fp32 weights."""
    run = dict(world=2, tp=2)
    save, target = tmp_path / "run", tiny_run["target"]["path"]
    of_run = partial(command_line, tiny_run, iterations=4, tp=2)
    whole = pool.run(pretrain_steps, **run, line=of_run(tmp_path / "whole", "--bf16"))
    line = of_run(save, "--bf16", "--load", str(save))
    first = pool.run(pretrain_steps, **run, line=[*line, "--exit-interval", "2"])
    then = pool.run(pretrain_steps, **run, line=line)
    assert len(first[0]) == len(then[0]) == 2
    for rank in range(2):
        for got, expected in zip(first[rank] + then[rank], whole[rank], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    reader = CheckpointReader(find_checkpoint(save))
    assert reader.meta["iteration"] == 4 and reader.meta["consumed_samples"] == 32
    _, weights = whole[0][-1]
    assert set(reader.names()) == set(weights)
    name = "confidence_head.proj.weight"
    assert torch.equal(reader.tensor(name), weights[name])
    start = {"initial_checkpoint": str(save), "dtype": "bfloat16"}
    config = config_of(tiny_run, tmp_path / "next", 2, 2, train=start)
    for weights, rank in zip(pool.run(first_weights, **run, config=config), whole, strict=True):
        torch.testing.assert_close(weights, rank[-1][1], rtol=0, atol=0)
    export = export_checkpoint(save, target, tmp_path / "export")
    assert any("equals the checkpoint's" in said for said in verify_folder(export, checkpoint=save))
    with pytest.raises(AssertionError, match="num_anchors: 6 there, 5 here"):
        pool.run(pretrain_steps, **run, line=[*line, "--dspark-num-anchors", "5"])


def test_another_architecture_than_the_targets_is_refused(pool, tiny_run, tmp_path):
    line = command_line(tiny_run, tmp_path, "--num-layers", "6", iterations=1)
    with pytest.raises(AssertionError, match="--num-layers is 6 and must be the target's .4."):
        pool.run(pretrain_steps, world=1, tp=1, line=line)


def test_the_launch_script_parses(tmp_path):
    """With a stand-in for torchrun; its target is not here, so the config alone is made."""
    from megatron.training.arguments import parse_args, validate_args

    from dspark_megatron.megatron_lm.arguments import (
        ARGS_DEFAULTS,
        add_dspark_args,
        config_from_args,
    )

    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = EXAMPLE / "train_qwen3_32b.sh"
    line = subprocess.run([script], env=place, capture_output=True, text=True, check=True)
    options, program, *line = line.stdout.splitlines()[1:]
    assert options == "8" and Path(program) == EXAMPLE / "pretrain_dspark.py"
    runtime = mock.Mock(rank=0, world_size=8)
    with as_launched(runtime, line):
        args = parse_args(add_dspark_args)
        validate_args(args, ARGS_DEFAULTS)
    config = config_from_args(args)
    recipe = load_config(EXAMPLE.parent / "qwen3-32b.yaml")
    for section in ("target", "model", "loss", "data", "parallel"):
        assert getattr(config, section) == getattr(recipe, section)
    assert config.optimizer == replace(recipe.optimizer, overlap_grad_reduce=True)
    assert config.train.recompute_activations


def test_arguments_of_checkpoints_have_these_names():
    """What is read of a target's checkpoint, by the names that this version's parser gives."""
    from megatron.training.arguments import parse_args

    from dspark_megatron.targets.megatron.checkpoint import arguments_read

    with mock.patch("sys.argv", ["pretrain"]):
        assert arguments_read(parse_args()) == []


def test_the_signature_of_this_version():
    from megatron.training import pretrain

    from dspark_megatron.megatron_lm.launch import pretrain_arguments

    given = pretrain_arguments(pretrain, PROVIDERS, PARSING, lambda **parsing: parsing)
    assert inspect.signature(pretrain).bind(**given).arguments["cfg_container"] == PARSING
    assert PROVIDERS.items() <= given.items()


def test_a_wheel_has_what_the_makefile_makes(tmp_path):
    """Nothing is made or written; a checkout, which has a Makefile, is made as ever."""
    from megatron.core.datasets import utils

    from dspark_megatron.megatron_lm.launch import built_helper

    made = mock.Mock()
    with (
        mock.patch.object(utils, "compile_helpers", made),
        mock.patch.object(utils, "__file__", str(tmp_path / "utils.py")),
    ):
        with built_helper():
            utils.compile_helpers()
        assert not made.called and utils.compile_helpers is made
        assert not any(tmp_path.iterdir())
        (tmp_path / "Makefile").write_text("all:\n")
        with built_helper():
            utils.compile_helpers()
        assert made.called


def test_neither_a_helper_nor_a_makefile_is_known_before_the_launch(tmp_path):
    from megatron.core.datasets import utils

    from dspark_megatron.megatron_lm.launch import built_helper

    with (
        mock.patch.object(utils, "__file__", str(tmp_path / "utils.py")),
        mock.patch.object(importlib.util, "find_spec", return_value=None),
        pytest.raises(ConfigError, match="must have helpers_cpp, or the Makefile"),
    ):
        built_helper().__enter__()


# The check that runs all this on a GPU


def context_of(folder):
    return SimpleNamespace(device=torch.device("cpu"), folder=folder, figures={}, tiny=True)


def test_the_check_runs_pretrain_in_processes_of_its_own(tmp_path):
    from gpu_checks import pretrain

    context = context_of(tmp_path)
    pretrain.check(context)
    figures = context.figures
    assert list(figures["losses"]) == [1, 2, 3, 4] and list(figures["resumed"]["losses"]) == [3, 4]
    assert figures["resumed"]["relative_difference"] == {"with_equal_weights": 0, "largest": 0}
    assert figures["our_loop"]["relative_difference"]["largest"] < 1e-3
    assert "vLLM: loads" in figures["export"]


def test_the_check_says_what_it_lacks(tmp_path):
    from gpu_checks import pretrain
    from gpu_checks.context import Skip

    with (
        mock.patch.object(importlib.util, "find_spec", return_value=None),
        pytest.raises(Skip, match="megatron-core 0.* without megatron.training"),
    ):
        pretrain.check(context_of(tmp_path))


def test_the_check_tells_a_failure_in_one_sentence(tmp_path):
    from gpu_checks import pretrain

    context = context_of(tmp_path)
    with pytest.raises(AssertionError, match="whole ended with code 1 .* ValueError: no such GPU"):
        pretrain._run(context, "whole", ["-c", "raise ValueError('no such GPU')"])
    compare = partial(pretrain._assert_close, context, "resumed", first=3, last=4)
    with pytest.raises(AssertionError, match="must have steps 3 to 4 and has .1, 2."):
        compare({1: 2.0, 2: 1.9}, {3: 1.8, 4: 1.7})
    compare({3: 1.8, 4: 1.71}, {3: 1.8, 4: 1.7})
    with pytest.raises(AssertionError, match="loss of step 3 is 1.810000, that of pretrain"):
        compare({3: 1.81, 4: 1.7}, {3: 1.8, 4: 1.7})
