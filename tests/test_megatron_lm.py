"""Megatron's own schedule trains a draft as our loop does, step by step."""

import pytest
import torch
import torch.distributed as dist
from tiny_target import tiny_config

STEPS = 4


def our_steps(runtime, config):
    """Means and trained weights after each step of our loop."""
    from pathlib import Path

    from dspark_megatron.shape import check_batch_size
    from dspark_megatron.training.loop import Trainer, load_data
    from dspark_megatron.training.setup import check_run

    plan = check_run(config, runtime.world_size)
    check_batch_size(config.train, plan.dp_size)
    data = load_data(plan, runtime)
    output = Path(config.train.output_dir)
    output.mkdir(exist_ok=True)
    trainer = Trainer(plan, runtime, data, output, None, None, None)
    steps = []
    for _ in range(STEPS):
        metrics = trainer._new_metrics()
        trainer._train_step(metrics)
        means = metrics.reduced(dp_group=runtime.dp_group).means(trainer.step.draft_loss.weights)
        steps.append((means, trained(trainer.draft)))
    return steps


def megatron_steps(runtime, config):
    """The same of Megatron's schedule, with our optimizer settings; its way to average."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    from dspark_megatron.megatron_lm.pretraining import DraftPretraining
    from dspark_megatron.training import optimizer as o

    pretraining = DraftPretraining(config, runtime)
    draft = pretraining.build_model()
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
    iterator = pretraining.micro_batches.from_sample(0)
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


def trained(draft):
    return {n: p.detach().clone() for n, p in draft.named_parameters() if p.requires_grad}


def assert_same_steps(got, expected, **tolerance):
    """Of one rank."""
    assert len(got) == len(expected) == STEPS
    for (means, weights), (wanted_means, wanted) in zip(got, expected, strict=True):
        rates = wanted_means.pop("accept_rate")
        wanted_means |= {f"accept_rate/{k}": rate for k, rate in enumerate(rates)}
        assert means == pytest.approx(wanted_means, **tolerance)
        assert set(weights) == set(wanted)
        for name, weight in weights.items():
            closeness = dict(rtol=tolerance["rel"], atol=tolerance["abs"])
            torch.testing.assert_close(weight, wanted[name], **closeness)


def config_of(tiny_run, tmp_path, micro_batch_size=1, tp=1, **sections):
    train = {"output_dir": str(tmp_path), "micro_batch_size": micro_batch_size, "iterations": 8}
    train |= {"global_batch_size": 8, **sections.pop("train", {})}
    parallel = {"tensor_parallel": tp, **sections.pop("parallel", {})}
    # Adam would make a whole step of the rounding of a gradient that is nearly 0.
    optimizer = {"adam_eps": 1e-3, **sections.pop("optimizer", {})}
    return tiny_config(tiny_run, train=train, parallel=parallel, optimizer=optimizer, **sections)


OVERLAP = {"optimizer": {"overlap_grad_reduce": True}}
PLAIN = {"optimizer": {"use_distributed_optimizer": False}}
SPLIT_ROWS = {"parallel": {"sequence_parallel": True}}


@pytest.mark.parametrize(
    "world, tp, micro_batch_size, sections",
    [
        (1, 1, 2, {}),
        (2, 2, 1, SPLIT_ROWS),
        (2, 1, 2, PLAIN),
        (4, 2, 1, OVERLAP),
        (4, 2, 4, {"loss": {"loss_decay_gamma": None, "kl_loss_alpha": 0.5}}),
    ],
)
def test_the_schedule_makes_the_same_steps(
    pool, tiny_run, tmp_path, world, tp, micro_batch_size, sections
):
    config = config_of(tiny_run, tmp_path, micro_batch_size, tp, **sections)
    expected = pool.run(our_steps, world=world, tp=tp, config=config)
    got = pool.run(megatron_steps, world=world, tp=tp, config=config)
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_steps(mine, theirs, rel=2e-6, abs=2e-6)
