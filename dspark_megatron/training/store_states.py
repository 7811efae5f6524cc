"""The work of `dspark cache` on a rank."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dspark_megatron.config import Config
from dspark_megatron.config.loading import load_config
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.errors import printable, require
from dspark_megatron.run.check import RunPlan, check
from dspark_megatron.run.data import load_train_data
from dspark_megatron.run.identity import fix_template_day
from dspark_megatron.run.output import own_folder
from dspark_megatron.run.ranks.agreement import agree, agree_at_launch
from dspark_megatron.run.ranks.facts import launch_facts, target_facts
from dspark_megatron.run.ranks.places import at, set_time_limit
from dspark_megatron.run.ranks.runtime import Launch, Runtime, from_main_rank, start
from dspark_megatron.run.ranks.shared_folder import check_shared
from dspark_megatron.run.states import checked_target, kept_facts, sample_facts, states_facts
from dspark_megatron.targets.stored.deepspec_layout import DeepSpecLayout
from dspark_megatron.targets.stored.safetensors_layout import SafetensorsLayout
from dspark_megatron.targets.stored.writer import StatesWriter


def run(job: Launch, args: Namespace) -> Path:
    """Returns the folder of the states."""
    config, output = _checked_config(args)
    set_time_limit(config.train.timeout_minutes)
    own = {name: getattr(args, name) for name in ("output", "dtype", "format", "shard_mib")}
    agree_at_launch(job, launch_facts(config, command="prepare_target_cache", **own))
    plan = check(config, job.world_size, use="store_states")
    fix_template_day(plan, job.main_ranks, stored=output)
    tp, shards = config.parallel.tensor_parallel, plan.shards_target
    runtime = start(job, tp, shards_target=shards, uneven=True)
    agree(target_facts(plan))
    with own_folder(output, "the folder of the states", runtime):
        store_states(plan, runtime, output, args)
    return output


def _checked_config(args: Namespace) -> tuple[Config, Path]:
    """The run's config, with the target itself as provider, and the folder of its states."""
    config = load_config(args.config, args.overrides)
    if config.target.is_stored:
        config.target.provider = "megatron" if config.target.checkpoint else "huggingface"
        config.validate()
    require(
        args.output is not None or bool(config.target.cache),
        "there is no folder to write to; give --output or target.cache",
    )
    require(args.shard_mib > 0, f"--shard-mib ({args.shard_mib}) must be > 0")
    if args.format == "deepspec":
        require(
            args.dtype == "bfloat16",
            f"DeepSpec's cache is in bf16, not {args.dtype}; leave --dtype out or --format",
        )
        require(
            config.needs_target_logits,
            "DeepSpec's cache has last hidden states, which an objective of cross entropy alone "
            "does not load; give --format rows",
        )
    return config, args.output or Path(config.target.cache)


def store_states(plan: RunPlan, runtime: Runtime, output: Path, args: Namespace) -> None:
    """Say how much it will be, then write what is missing; every rank calls it. args: `format`,
    `dtype` and `shard_mib` of the command."""
    data = load_train_data(plan, runtime)
    facts: dict[str, Any] = {
        **states_facts(plan),
        "data": {"fingerprint": data.fingerprint, **sample_facts(plan)},
    }
    if args.format == "rows":
        facts |= kept_facts(plan)
    layout = _layout(plan, args)
    writer = StatesWriter(layout, data, output, facts, shard_bytes=int(args.shard_mib * 2**20))
    missing = None
    if runtime.is_main:
        print(printable(_size_line(plan, data, writer)), flush=True)
        missing = writer.claim()
    if missing := from_main_rank(missing):
        check_shared(f"the folder of the states {output}", output, runtime=runtime)
        target = checked_target(plan, runtime, data)
        size = plan.samples_outside_training
        at("storing states")
        groups = dict(tp_group=runtime.tp_group, dp_group=runtime.dp_group)
        writer.write(missing, target, micro_batch_size=size, **groups)
    dist.barrier()
    if runtime.is_main:
        writer.finish()
        text = f"{output} is complete; train with target.provider=cache target.cache={output}"
        print(printable(text))


def _layout(plan: RunPlan, args: Namespace) -> DeepSpecLayout | SafetensorsLayout:
    config, shape = plan.config, plan.shape
    if args.format == "deepspec":
        return DeepSpecLayout(shape.hidden_size, shape.target_layer_ids, config.target.path)
    return SafetensorsLayout(
        shape.hidden_size,
        len(shape.target_layer_ids),
        args.dtype,
        shape.num_draft_tokens,
        config.loss,
        with_last_hidden=config.needs_target_logits,
    )


def _size_line(plan: RunPlan, data: ConversationDataset, writer: StatesWriter) -> str:
    """What all the states take, and what they would in DeepSpec's layout."""
    shape, tokens = plan.shape, data.report.total_tokens
    deepspec = DeepSpecLayout(shape.hidden_size, shape.target_layer_ids, "")
    theirs = sum(deepspec.entry(data[i]).nbytes for i in range(len(data)))
    return (
        f"states of {len(data):,} samples with {tokens:,} tokens: "
        f"{writer.nbytes / 2**30:,.3f} GiB, {writer.nbytes / tokens:,.0f} bytes a token; "
        f"DeepSpec's layout (bf16): {theirs / 2**30:,.3f} GiB, {theirs / tokens:,.0f} bytes a "
        f"token; {writer.nbytes / theirs:.1%} of it"
    )
