"""What `pretrain()` is made of, from Megatron-Core's 0.19 wheel, runs a draft; `pretrain()` itself
asks for a GPU."""

import contextlib
import importlib.util
import inspect
import os
import queue
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_megatron_lm import (
    PARSING,
    PROVIDERS,
    STEPS,
    assert_same_steps,
    config_of,
    our_steps,
    trained,
)

from dspark_megatron.config import ConfigError
from dspark_megatron.config_file import load_config

EXAMPLE = Path(__file__).parents[1] / "examples" / "megatron_lm"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="needs Megatron-Core 0.19's wheel"
)


def command_line(tiny_run, save, *more, tp=1, iterations=8):
    """Of a launch script: Megatron's arguments and the draft's."""
    model = tiny_run["model"]
    ids = map(str, model["target_layer_ids"])
    return [
        *("--tokenizer-model", tiny_run["target"]["path"]),
        *("--data-path", *tiny_run["data"]["train_files"]),
        *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "8"),
        *("--seq-length", "48", "--max-position-embeddings", "256"),
        *("--micro-batch-size", "2", "--global-batch-size", "8"),
        *("--train-iters", str(iterations), "--lr", "1e-2", "--lr-decay-style", "constant"),
        *("--adam-eps", "1e-3", "--weight-decay", "0", "--eval-iters", "0"),
        *("--eval-interval", "1000"),
        *("--adam-beta2", "0.999", "--clip-grad", "1.0", "--seed", "1234"),
        *("--transformer-impl", "local", "--disable-gloo-process-groups"),
        *("--no-gradient-accumulation-fusion", "--use-distributed-optimizer"),
        *("--tensor-model-parallel-size", str(tp), "--calculate-per-token-loss"),
        *("--save", str(save), "--save-interval", "2", "--log-interval", "1"),
        *("--dspark-num-layers", "2", "--dspark-block-size", "3", "--dspark-num-anchors", "6"),
        *("--dspark-target-layer-ids", *ids),
        *("--dspark-mask-token-id", str(model["mask_token_id"]), "--dspark-markov-rank", "8"),
        *("--dspark-loss-chunk-rows", "32", "--no-dspark-data-show-sample"),
        *more,
    ]


@contextlib.contextmanager
def as_launched(runtime, line):
    """With torchrun's environment; with an answer to what Megatron asks after the GPU; without the
    Makefile that the wheel lacks, having what it makes; and saving without a process that serves a
    queue, which would outlive a killed rank."""
    from megatron.core.datasets import utils
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import arguments

    place = {"RANK": str(runtime.rank), "WORLD_SIZE": str(runtime.world_size)}
    argv = ["pretrain_dspark.py", *line]
    with (
        mock.patch.dict(os.environ, place),
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(arguments, "get_device_arch_version", return_value=10),
        mock.patch.object(utils, "compile_helpers"),
        mock.patch.object(filesystem_async, "_results_queue", queue.Queue()),
    ):
        yield


def pretraining_steps(runtime, line, steps):
    """As `pretrain()` does, but for what it asks a GPU for: means and weights after each step."""
    from megatron.core import num_microbatches_calculator, rerun_state_machine
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config, unwrap_model
    from megatron.training import global_vars, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    from dspark_megatron import megatron_lm
    from dspark_megatron.megatron_lm import pretraining
    from dspark_megatron.megatron_lm.arguments import ARGS_DEFAULTS

    with as_launched(runtime, line), contextlib.ExitStack() as ending:
        args = parse_and_validate_args(
            extra_args_provider=megatron_lm.add_dspark_args, args_defaults=ARGS_DEFAULTS
        )
        for forget in (
            pretraining._this_run.cache_clear,
            global_vars.destroy_global_vars,
            num_microbatches_calculator.destroy_num_microbatches_calculator,
        ):
            ending.callback(forget)
        forget_reruns = rerun_state_machine.destroy_rerun_state_machine
        forget_reruns()  # of a loop that did not initialize it
        initialize_megatron(allow_no_cuda=True)
        ending.callback(forget_reruns)
        model, optimizer, scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            model_provider_func=megatron_lm.model_provider,
            cfg_container=pretrain_cfg_container_from_args(args),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        iterator, _, _ = training.build_train_valid_test_data_iterators(
            megatron_lm.datasets_provider
        )
        config = get_model_config(model[0])
        config.grad_scale_func = optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        draft, done = unwrap_model(model[0]), []
        for iteration in range(args.iteration, args.iteration + steps):
            means, *_ = training.train_step(
                megatron_lm.forward_step,
                iterator,
                model,
                optimizer,
                scheduler,
                config,
                get_forward_backward_func(),
                iteration=iteration,
            )
            args.consumed_train_samples += args.global_batch_size
            means = {name: value.item() for name, value in means.items()}
            done.append((means, trained(draft)))
            if (iteration + 1) % args.save_interval == 0:
                training.save_checkpoint(iteration + 1, model, optimizer, scheduler, 0)
        return done


def test_steps_of_megatrons_train_step(pool, tiny_run, tmp_path):
    """Its schedule of the learning rate is one step behind ours: a constant one is the same."""
    constant = {"warmup_ratio": 0.0, "min_lr_ratio": 1.0}
    config = config_of(tiny_run, tmp_path / "ours", 2, 2, optimizer=constant)
    expected = pool.run(our_steps, world=4, tp=2, config=config)
    line = command_line(tiny_run, tmp_path / "theirs", tp=2)
    got = pool.run(pretraining_steps, world=4, tp=2, line=line, steps=STEPS)
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_steps(mine, theirs, rel=2e-6, abs=2e-6)


def first_weights(runtime, config):
    from dspark_megatron.training.loop import build_run_draft
    from dspark_megatron.training.setup import check_run

    return trained(build_run_draft(check_run(config, runtime.world_size), runtime, is_new=True))


def test_a_checkpoint_of_megatrons_continues_and_is_known_to_our_tools(pool, tiny_run, tmp_path):
    """It holds the draft alone. With bf16, since Megatron cannot load its distributed optimizer for
    fp32 weights."""
    from dspark_megatron.conversion.megatron_checkpoint import CheckpointReader, find_checkpoint

    run = dict(world=2, tp=2)
    save = tmp_path / "run"
    line = command_line(tiny_run, tmp_path / "whole", "--bf16", tp=2)
    whole = pool.run(pretraining_steps, **run, line=line, steps=4)
    line = command_line(tiny_run, save, "--bf16", "--load", str(save), tp=2)
    first = pool.run(pretraining_steps, **run, line=line, steps=2)
    then = pool.run(pretraining_steps, **run, line=line, steps=2)
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
    other = ["--dspark-num-anchors", "5"]
    with pytest.raises(AssertionError, match="num_anchors: 6 there, 5 here"):
        pool.run(pretraining_steps, **run, line=line + other, steps=1)


def test_another_architecture_than_the_targets_is_refused(pool, tiny_run, tmp_path):
    line = command_line(tiny_run, tmp_path, "--num-layers", "6")
    with pytest.raises(AssertionError, match="--num-layers is 6 and must be the target's .4."):
        pool.run(pretraining_steps, world=1, tp=1, line=line, steps=1)


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
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MEGATRON_LM": "Megatron-LM"}
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


def test_a_wheel_without_a_makefile_is_known_before_the_launch():
    from dspark_megatron import megatron_lm

    with pytest.raises(ConfigError, match="must have a Makefile"):
        megatron_lm.launch_pretrain(
            datasets_provider=megatron_lm.datasets_provider,
            model_provider=megatron_lm.model_provider,
            forward_step=megatron_lm.forward_step,
            extra_args_provider=megatron_lm.add_dspark_args,
        )
