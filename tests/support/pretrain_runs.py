"""Megatron-LM's arguments of a tiny run, and its steps."""

import pytest
import torch

from support.tiny_target import tiny_config

STEPS = 4


def our_steps(runtime, config):
    """Means and trained weights after each step of our loop."""
    from pathlib import Path

    from dspark_megatron.run.check import check
    from dspark_megatron.run.data import load_train_data
    from dspark_megatron.training.loop import Trainer, build_run_draft

    plan = check(config, runtime.world_size, use="train")
    data = load_train_data(plan, runtime)
    output = Path(config.train.output_dir)
    output.mkdir(exist_ok=True)
    draft = build_run_draft(plan, runtime, is_new=True)
    trainer = Trainer(plan, runtime, data, output, None, draft, None)
    steps = []
    for _ in range(STEPS):
        metrics = trainer._new_metrics()
        trainer._train_step(metrics)
        means = metrics.reduced(dp_group=runtime.dp_group).means(
            trainer.step.forward_step.term_weights
        )
        steps.append((means, trained(trainer.draft)))
    return steps


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


PROVIDERS = {
    "train_valid_test_dataset_provider": "data",
    "model_provider": "model",
    "model_type": "type",
    "forward_step_func": "step",
}
PARSING = {"extra_args_provider": "arguments", "args_defaults": {"key": 1}}
