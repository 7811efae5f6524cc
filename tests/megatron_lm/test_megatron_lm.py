"""Megatron's own schedule trains a draft as our loop does, step by step."""

import argparse
import itertools
import math
import re
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dspark_megatron.config import Config
from dspark_megatron.errors import ConfigError
from support.pretrain_runs import (
    PARSING,
    PROVIDERS,
    STEPS,
    assert_same_steps,
    config_of,
    our_steps,
    trained,
)


def megatron_steps(runtime, config):
    """The same of Megatron's schedule, with our optimizer settings; its way to average."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    from dspark_megatron.mcore import optimizer as o
    from dspark_megatron.megatron_lm.pretraining import DraftPretraining

    pretraining = DraftPretraining(config, runtime)
    draft = pretraining.draft
    draft.model_type = ModelType.encoder_or_decoder
    is_bf16 = draft.config.bf16
    model = o.wrap_data_parallel(
        Float16Module(draft.config, draft) if is_bf16 else draft, config.optimizer
    )
    optimizer = o.build_optimizer(config.optimizer, model, pretraining.plan.dtype)
    scheduler = o.build_scheduler(config.optimizer, optimizer, config.train.iterations)
    draft.config.finalize_model_grads_func = finalize_model_grads
    draft.config.grad_scale_func = optimizer.scale_loss
    if config.optimizer.overlap_grad_reduce:
        draft.config.no_sync_func = model.no_sync
    iterator = pretraining.micro_batches(0)
    train, steps = config.train, []
    for _ in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reported = get_forward_backward_func()(
            forward_step_func=lambda it, wrapped: pretraining.forward_step(next(it), wrapped),
            data_iterator=iterator,
            model=[model],
            num_microbatches=train.global_batch_size
            // (train.micro_batch_size * runtime.dp_group.size()),
            seq_length=config.data.max_length,
            micro_batch_size=train.micro_batch_size,
            forward_only=False,
        )
        scheduler.step(1)
        optimizer.step()
        steps.append((averages(reported, runtime.dp_group), trained(draft)))
    return steps


def averages(reported, group):
    """What Megatron's train_step makes of the micro-batches' pairs."""
    means = {}
    for name in reported[0]:
        pair = torch.vstack([one[name].view(-1) for one in reported]).sum(dim=0)
        dist.all_reduce(pair, group=group)
        means[name] = (pair[0] / pair[1]).item()
    return means


OVERLAP = {"optimizer": {"overlap_grad_reduce": True}}
PLAIN = {"optimizer": {"use_distributed_optimizer": False}}
SPLIT_ROWS = {"parallel": {"sequence_parallel": True}}
BF16 = {"train": {"dtype": "bfloat16"}}
DPACE = {"loss": {"weighting": {"name": "dpace"}, "confidence_stop_gradient": True}}
DPARD = {
    "loss": {
        "weighting": {"name": "dpard"},
        "confidence_weights": "reach",
        "normalization": "global_samples",
    }
}


@pytest.mark.parametrize(
    "world, tp, micro_batch_size, sections",
    [
        (1, 1, 2, {}),
        (2, 2, 1, SPLIT_ROWS),
        (2, 1, 2, PLAIN),
        (4, 2, 1, OVERLAP),
        (4, 2, 4, {"loss": {"loss_decay_gamma": None, "kl_loss_alpha": 0.5}}),
        (2, 1, 4, BF16),
        (4, 2, 1, OVERLAP | DPACE),
        (2, 1, 2, DPARD),
    ],
)
def test_the_schedule_makes_the_same_steps(
    pool, tiny_run, tmp_path, world, tp, micro_batch_size, sections
):
    """In bf16 the gradients are rounded in another unit."""
    config = config_of(tiny_run, tmp_path, micro_batch_size, tp, **sections)
    expected = pool.run(our_steps, world=world, tp=tp, config=config)
    got = pool.run(megatron_steps, world=world, tp=tp, config=config)
    close = {"rel": 0.01, "abs": 1e-3} if sections is BF16 else {"rel": 2e-6, "abs": 2e-6}
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_steps(mine, theirs, **close)


def steps_with_idle_micro_batches(runtime, config, steps_of):
    """The fourth micro-batch of each step teaches the second data-parallel rank nothing."""
    from dspark_megatron.data.batch import MicroBatches

    make, number = MicroBatches._of, itertools.count(1)

    def make_idle(self, refs):
        batch = make(self, refs)
        if runtime.dp_group.rank() == 1 and next(number) % 4 == 0:
            return replace(batch, blocks=batch.blocks.part(slice(0)))
        return batch

    with mock.patch.object(MicroBatches, "_of", make_idle):
        return globals()[steps_of](runtime, config)


@pytest.mark.parametrize("sections", [{}, DPARD], ids=["weights", "samples"])
def test_a_micro_batch_without_anything_to_learn(pool, tiny_run, tmp_path, sections):
    place = dict(world=2, tp=1, config=config_of(tiny_run, tmp_path, **sections))
    run = partial(pool.run, steps_with_idle_micro_batches, **place)
    expected, got = run(steps_of="our_steps"), run(steps_of="megatron_steps")
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_steps(mine, theirs, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("most", [1.0, 53.7, 512 * 512 * 3.73, 2.0**30])
def test_tokens_fill_megatrons_count_and_do_not_overflow_it(most):
    from dspark_megatron.megatron_lm.pretraining import tokens_per_weight

    unit = tokens_per_weight(most)
    assert math.frexp(unit)[0] == 0.5, "a power of two changes no digit of a loss"
    assert 2**30 - 1 < most * unit <= 2**31 - 1


def test_three_of_a_micro_batch():
    from dspark_megatron.megatron_lm import loss_func

    loss = torch.tensor(3.0, requires_grad=True)
    ratios = {
        "tau": (torch.tensor(5.0), torch.tensor(2.0)),
        "accept_rate": (torch.tensor([0.5, 0.25]), torch.tensor([1.0, 1.0])),
    }
    scaled, num_tokens, reported = loss_func(loss, weight=2.3, unit=8.0, ratios=ratios)
    assert scaled.item() == 24 and scaled.requires_grad
    assert num_tokens.dtype == torch.int and num_tokens.item() == 18
    assert {name: pair.tolist() for name, pair in reported.items()} == {
        "tau": [5, 2],
        "accept_rate/0": [0.5, 1],
        "accept_rate/1": [0.25, 1],
    }


# Arguments
def config_of_line(*line, **given):
    """Of Megatron's arguments as its parser leaves them, by hand since few Pythons have it, and
    the draft's by ours."""
    from dspark_megatron.megatron_lm.arguments import add_dspark_args, config_from_args
    from support.megatron_parsing import parsed

    theirs = parsed(
        **{
            "tokenizer_model": "target",
            "data_path": ["chats.jsonl"],
            "train_samples": None,
            "train_iters": 10,
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "seq_length": 48,
            "lr": 1e-3,
            "log_interval": 10,
            "save_interval": 500,
            "calculate_per_token_loss": True,
            "dataloader_type": "external",
            "eval_iters": 0,
            **given,
        }
    )
    parser = add_dspark_args(argparse.ArgumentParser(allow_abbrev=False))
    return config_from_args(parser.parse_args(list(line), theirs))


DRAFT = ["--dspark-target-layer-ids", "0", "2", "--dspark-mask-token-id", "5"]


def test_arguments_become_a_config():
    more = ["--dspark-loss-decay-gamma", "null", "--no-dspark-enable-confidence-head"]
    more += ["--dspark-target-max-tokens-per-forward", "64", "--dspark-data-reasoning", "mask"]
    config = config_of_line(*DRAFT, *more, sequence_parallel=True)
    assert config.model.target_layer_ids == [0, 2] and config.model.mask_token_id == 5
    assert config.loss.loss_decay_gamma is None and not config.model.enable_confidence_head
    assert config.target.path == "target" and config.target.max_tokens_per_forward == 64
    assert config.data.train_files == ["chats.jsonl"] and config.data.reasoning == "mask"
    assert config.parallel.sequence_parallel and config.train.output_dir == "not saved"
    assert config.train.iterations == 10 and config.data.max_length == 48
    by_samples = config_of_line(*DRAFT, train_iters=None, train_samples=80, save="run")
    assert by_samples.train.iterations == 10 and by_samples.train.output_dir == "run"


def test_a_part_of_a_section_is_one_argument(capsys):
    line = ["--dspark-attention", "{window: 9, causal: sliding}", "--no-dspark-sample-from-anchor"]
    model = config_of_line(*DRAFT, *line, "--dspark-rope-parameters", "{rope_theta: 1e6}").model
    assert (model.attention.window, model.attention.causal) == (9, "sliding")
    assert not model.sample_from_anchor and model.rope_parameters == {"rope_theta": "1e6"}
    with pytest.raises(ConfigError, match="model.attention.windw"):
        config_of_line(*DRAFT, "--dspark-attention", "{windw: 9}")
    for name in ("attention", "rope-parameters"):
        with pytest.raises(SystemExit):
            config_of_line(*DRAFT, f"--dspark-{name}", "[1")
        assert "'[1' must be a mapping" in capsys.readouterr().err


def test_a_preset_decides_on_what_is_left_open():
    preset = ["--dspark-loss-preset", "speculators", "--dspark-loss-normalization", "global_step"]
    config = config_of_line(*DRAFT, *preset)
    assert (config.loss.anchor_rule, config.loss.terms.l1) == ("token", 0.45)


def test_every_key_has_one_argument():
    from dspark_megatron.config.objective.terms import OLDER_NAMES
    from dspark_megatron.megatron_lm.arguments import SECTIONS, add_dspark_args
    from dspark_megatron.megatron_lm.names import ARGUMENTS

    parser = add_dspark_args(argparse.ArgumentParser())
    ours = [action for action in parser._actions if action.dest.startswith("dspark_")]
    keys = [
        f"{section}.{key}"
        for section, values in Config().to_dict().items()
        if section in SECTIONS
        for key in values
    ]
    theirs = {entry.key for entry in ARGUMENTS}
    assert len(ours) == len([key for key in keys if key not in theirs]) + len(OLDER_NAMES)
    assert all(re.search("Default: |Older name of ", action.help) for action in ours)
    assert "100%" not in parser.format_help()  # a stray % would have raised


REFUSED = [
    ({"calculate_per_token_loss": False}, [], "--calculate-per-token-loss is False"),
    ({"pipeline_model_parallel_size": 2}, [], "--pipeline-model-parallel-size is 2"),
    ({"context_parallel_size": 2}, [], "context_parallel .2. must be 1"),
    ({"fp16": True}, [], "--fp16"),
    ({"fp8": "hybrid"}, [], "--fp8 is hybrid"),
    ({"optimizer": "muon"}, [], "--optimizer is muon and must be adam"),
    ({"dataloader_type": "cyclic"}, [], "--dataloader-type is cyclic"),
    ({"eval_iters": 100}, [], "--eval-iters is 100"),
    ({"ckpt_format": "torch"}, [], "--ckpt-format is torch"),
    ({"overlap_param_gather": True}, [], "--overlap-param-gather is True"),
    ({}, ["--dspark-loss-normalization", "local"], "loss-normalization is 'local'"),
    (
        {"overlap_grad_reduce": True},
        ["--dspark-loss-anchor-rule", "token"],
        "--dspark-loss-anchor-rule 'token'",
    ),
    ({}, ["--dspark-block-size", "0"], "model.block_size .0. must be > 0"),
]


@pytest.mark.parametrize("given, line, message", REFUSED)
def test_contradictions_are_refused(given, line, message):
    with pytest.raises(ConfigError, match=message):
        config_of_line(*DRAFT, *line, **given)


# Signatures of `pretrain` that are not installed here
def pretrain_0_17(
    train_valid_test_dataset_provider,
    model_provider,
    model_type,
    forward_step_func,
    process_non_loss_data_func=None,
    extra_args_provider=None,
    args_defaults={},  # noqa: B006
    get_embedding_ranks=None,
    get_position_embedding_ranks=None,
    non_loss_data_func=None,
    store=None,
    inprocess_call_wrapper=None,
):
    return {name: value for name, value in locals().items() if value is not None}


def pretrain_0_18(
    cfg_container,
    train_valid_test_dataset_provider,
    model_provider,
    model_type,
    forward_step_func,
    process_non_loss_data_func=None,
    get_embedding_ranks=None,
    get_position_embedding_ranks=None,
    non_loss_data_func=None,
    store=None,
    inprocess_call_wrapper=None,
):
    return {name: value for name, value in locals().items() if value is not None}


@pytest.mark.parametrize(
    "pretrain, more",
    [(pretrain_0_17, PARSING), (pretrain_0_18, {"cfg_container": PARSING})],
)
def test_pretrain_is_called_as_its_version_has_it(pretrain, more):
    from dspark_megatron.megatron_lm.launch import pretrain_arguments

    given = pretrain_arguments(pretrain, PROVIDERS, PARSING, lambda **parsing: parsing)
    assert pretrain(**given) == {**PROVIDERS, **more}
