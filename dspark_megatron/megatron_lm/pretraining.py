"""What `pretrain()` asks for of a draft: its model, its data, its forward step and its loss.

Megatron wraps and saves the draft alone; the frozen target is beside it.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.config import Config
from dspark_megatron.data.ahead import StepsAhead
from dspark_megatron.data.batch import MicroBatch, MicroBatches
from dspark_megatron.data.blocks import slot_weights
from dspark_megatron.errors import require
from dspark_megatron.megatron_lm.arguments import config_from_args
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.check import check
from dspark_megatron.run.checkpoints.state import check_same_run
from dspark_megatron.run.data import load_train_data
from dspark_megatron.run.identity import export_settings, fix_template_day, run_identity
from dspark_megatron.run.ranks.agreement import agree
from dspark_megatron.run.ranks.facts import draft_facts, launch_facts, target_facts
from dspark_megatron.run.ranks.runtime import Runtime, from_main_rank, main_ranks_folder
from dspark_megatron.run.states import states_source
from dspark_megatron.storage.checkpoints.meta import FORMAT
from dspark_megatron.storage.checkpoints.metadata import META
from dspark_megatron.storage.checkpoints.tracker import latest_iteration, mend_tracker
from dspark_megatron.storage.checkpoints.whole import iteration_folder
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.storage.writing import write_json
from dspark_megatron.training.forward_step import ForwardStep
from dspark_megatron.training.loop import build_run_draft
from dspark_megatron.training.metrics import MetricSums

_MOST_TOKENS = 2**31 - 1
"""Megatron counts the tokens of a step in 32 bits."""


class DraftPretraining:
    """A draft in a loop of Megatron's, whose process groups are there."""

    def __init__(self, config: Config, runtime: Runtime, *, is_new: bool = True) -> None:
        """Makes the draft, reads the data and loads the target. Raises ConfigError for settings
        that cannot work. is_new: no checkpoint is to be loaded, so the draft has the weights that
        it starts from."""
        self.plan = plan = check(config, runtime.world_size, use="train")
        fix_template_day(plan, lambda make: from_main_rank(make() if runtime.is_main else ""))
        self.runtime = runtime
        agree(launch_facts(config, command="pretrain") | target_facts(plan))
        self.draft = build_run_draft(plan, runtime, is_new=is_new)
        self.dataset = load_train_data(plan, runtime)
        self._batches = MicroBatches(config, self.dataset, dp_group=runtime.dp_group)
        agree(draft_facts(self.draft, runtime.tp_group.rank()))
        target = states_source(plan, runtime, self.dataset, self.draft)
        self._step = ForwardStep(
            config.loss,
            self.draft,
            target,
            plan.target_transform,
            tp_group=runtime.tp_group,
            device=runtime.device,
        )
        self._unit = tokens_per_weight(largest_divisor(config))

    def micro_batches(self, consumed_samples: int) -> Iterator[MicroBatch]:
        """Those after so many samples, without end. The target is told of each step's before their
        first."""
        samples, device = self.plan.config.train.global_batch_size, self.runtime.device
        with StepsAhead(self._batches, step_samples=samples, device=device) as steps:
            while True:
                step = steps.of_step(consumed_samples)
                self._step.expect(step)
                yield from step
                consumed_samples += samples

    def forward_step(self, batch: MicroBatch, model: Any) -> tuple[Tensor, partial]:
        """The weighted sum of the loss [], and the function that makes Megatron's three of it."""
        metrics = MetricSums.zeros(self.plan.shape.num_draft_tokens, self.runtime.device)
        loss = self._step(batch, model, metrics)
        if loss is None:
            loss = torch.zeros((), device=self.runtime.device)
        return loss, partial(
            loss_func,
            weight=self._step.divisor(batch),
            unit=self._unit,
            ratios=metrics.ratios(self._step.term_weights),
        )


def largest_divisor(config: Config) -> float:
    """What the loss sums of a step are divided by, at most."""
    samples, loss = config.train.global_batch_size, config.loss
    if loss.normalization == "global_samples":
        return samples
    gamma = loss.loss_decay_gamma if loss.weighting.name == "decay" else None
    slots = slot_weights(config.model.num_draft_tokens, gamma)
    return samples * config.model.num_anchors * float(slots.sum())


def tokens_per_weight(most: float) -> float:
    """Megatron's tokens in a weight of 1: the largest power of two with which no step, which weighs
    `most` at most, overflows its count."""
    return 2.0 ** math.floor(math.log2(_MOST_TOKENS / most))


def loss_func(
    loss_sum: Tensor, *, weight: float, unit: float, ratios: dict[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss sum [], number of tokens [] and {name: [numerator, denominator]} of a micro-batch, as
    Megatron has them with `--calculate-per-token-loss`.

    Megatron divides the gradient of a step's loss sums by its number of tokens, an integer, and
    what ours is divided by is a weight, a fraction. So a weight of 1 is `unit` tokens, a power of
    two, and the loss sum is in the same unit: what is rounded is the divisor alone, by half a token
    at most.
    """
    num_tokens = torch.tensor(round(weight * unit), dtype=torch.int, device=loss_sum.device)
    reported = {}
    for name, (numerator, denominator) in ratios.items():
        pair = torch.stack([numerator, denominator])
        if pair.dim() == 1:
            reported[name] = pair
        else:
            reported |= {f"{name}/{slot}": of_slot for slot, of_slot in enumerate(pair.unbind(1))}
    return loss_sum * unit, num_tokens, reported


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> DSparkDraftModel:
    """The draft, which keeps `pg_collection`; the rest is of pipelines and of other models."""
    pretraining, args = _this_run()
    _keep_meta(pretraining, args)
    pretraining.draft.pg_collection = pg_collection
    return pretraining.draft


def datasets_provider(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
    """The training micro-batches from the first sample that is not yet consumed, without end; none
    to validate or test on."""
    pretraining, args = _this_run()
    return pretraining.micro_batches(args.consumed_train_samples), None, None


# Every tensor-parallel rank reads the data.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def forward_step(data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, partial]:
    """The loss of the next micro-batch, and what Megatron divides it by."""
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = next(data_iterator)
    timers("batch-generator").stop()
    return _this_run()[0].forward_step(batch, model)


@cache
def _this_run() -> tuple[DraftPretraining, Namespace]:
    """Of this process; made at the first call, when Megatron has its arguments and groups."""
    from megatron.training import get_args

    args = get_args()
    config = config_from_args(args)
    _check_architecture(args, config)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    runtime, found = Runtime.joined(device), None
    if runtime.is_main and args.load and not args.finetune:
        found = _continued(Path(args.load))
    continues = main_ranks_folder(found, runtime) is not None
    return DraftPretraining(config, runtime, is_new=not continues), args


def _continued(load: Path) -> Path | None:
    """The folder, if it has a checkpoint to continue from; None where it has none. Megatron goes by
    the tracker alone and would start anew without it."""
    if (load / "release").is_dir():  # a checkpoint without an iteration, which Megatron loads
        return load
    newest = latest_iteration(load)
    if newest is None:
        return None
    mend_tracker(iteration_folder(load, newest))
    return load


def _check_architecture(args: Namespace, config: Config) -> None:
    """What Megatron asks for of a model is the target's: it counts operations by it."""
    text = load_target_config(config.target.path).get_text_config()
    theirs = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
    }
    for name, value in theirs.items():
        found = getattr(args, name)
        require(
            found == value,
            f"--{name.replace('_', '-')} is {found} and must be the target's ({value}); what is "
            "the draft's has arguments that begin with --dspark",
        )


def _keep_meta(pretraining: DraftPretraining, args: Namespace) -> None:
    """Write `dspark.json`, by which exports and later runs know the checkpoints, beside them; once
    what --load and --save hold is seen to be of this run."""
    plan = pretraining.plan
    identity = {**run_identity(plan), "data_fingerprint": pretraining.dataset.fingerprint}
    for folder in (None if args.finetune else args.load, args.save):
        if folder and (Path(folder) / META).is_file():
            check_same_run(Path(folder), identity)
    if not args.save or not pretraining.runtime.is_main:
        return
    meta = {
        "format": FORMAT,
        **identity,
        **export_settings(plan),
        "global_batch_size": plan.config.train.global_batch_size,
        "open_metrics": [],
    }
    write_json(Path(args.save) / META, meta)
