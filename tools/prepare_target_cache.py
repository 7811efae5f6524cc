"""Write the target's states of a run's data to disk, for `target.provider: cache`.

    torchrun --nproc-per-node N tools/prepare_target_cache.py --config run.yaml \\
        [--output DIR] [--dtype bfloat16|float8|float32] [--format rows|deepspec] \\
        [section.key=value ...]

Any layout that trains writes: tensor parallelism, sharding and expert parallelism as in the config;
data-parallel ranks share out the shards. It says first how much it will write and refuses what the
disk cannot hold. Killed at any point, the same command goes on where it was. `deepspec` is
DeepSpec's own layout (version 2): larger, for its trainer.
"""

import argparse
from pathlib import Path
from typing import Any


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a cache of the target's states.")
    add = parser.add_argument
    add("--config", required=True, help="YAML file of the run that is to read it")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--output", type=Path, help="an empty or new folder, or one to go on with; target.cache")
    types = ["bfloat16", "float8", "float32"]
    add("--dtype", choices=types, default="bfloat16", help="of the taps; float8: e4m3, scaled")
    add("--format", choices=["rows", "deepspec"], default="rows", help="layout of the files")
    add("--shard-mib", type=float, default=512, help="of a shard, at most; a kill loses one a rank")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    from dspark_megatron.run.runtime import launch, start

    with launch() as job:
        from dspark_megatron.run.agreement import agree, agree_at_launch
        from dspark_megatron.run.check import check_run
        from dspark_megatron.run.rank_facts import launch_facts, target_facts
        from dspark_megatron.run.template_day import fix_template_day
        from dspark_megatron.targets.huggingface.quantization import check_quantization

        config, output = checked_config(args)
        own = {name: getattr(args, name) for name in ("output", "dtype", "format", "shard_mib")}
        agree_at_launch(job, launch_facts(config, command="prepare_target_cache", **own))
        plan = check_run(config, job.world_size)
        fix_template_day(plan, job.main_ranks, cache=output)
        check_quantization(plan.target_config, plan.target_split)
        tensor_parallel = config.parallel.tensor_parallel
        runtime = start(job, tensor_parallel, shards_target=plan.target_split.lockstep)
        agree(target_facts(plan))
        prepare(plan, runtime, output, args)


def checked_config(args: argparse.Namespace) -> tuple[Any, Path]:
    """The run's config, with the target itself as provider, and the folder of the cache."""
    from dspark_megatron.config.loading import load_config
    from dspark_megatron.errors import require

    config = load_config(args.config, args.overrides)
    if config.target.is_stored:
        config.target.provider = "megatron" if config.target.checkpoint else "huggingface"
        config.validate()
    output = args.output or Path(config.target.cache)
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
    return config, output


def prepare(plan: Any, runtime: Any, output: Path, args: argparse.Namespace) -> None:
    """Estimate, then write what is missing; every rank calls it."""
    import torch.distributed as dist

    from dspark_megatron.targets.stored.writer import StatesWriter
    from dspark_megatron.training.loop import load_data

    data = load_data(plan, runtime)
    layout, facts = layout_and_facts(plan, data, args)
    writer = StatesWriter(layout, data, output, facts, shard_bytes=int(args.shard_mib * 2**20))
    missing: list[Any] = [None]
    if runtime.is_main:
        print(size_line(plan, data, writer), flush=True)
        missing[0] = writer.claim()
    dist.broadcast_object_list(missing, 0)
    if missing[0]:
        target = checked_target(plan, runtime, data)
        size = plan.config.train.micro_batch_size
        groups = dict(tp_group=runtime.tp_group, dp_group=runtime.dp_group)
        writer.write(missing[0], target, micro_batch_size=size, **groups)
    dist.barrier()
    if runtime.is_main:
        writer.finish()
        print(f"{output} is complete; train with target.provider=cache target.cache={output}")


def layout_and_facts(plan: Any, data: Any, args: argparse.Namespace) -> tuple[Any, dict]:
    from dspark_megatron.run.states import data_facts, kept_facts, target_facts
    from dspark_megatron.targets.stored.deepspec_layout import DeepSpecLayout
    from dspark_megatron.targets.stored.safetensors_layout import SafetensorsLayout

    config, shape = plan.config, plan.shape
    facts = {
        **target_facts(plan),
        "data": {"fingerprint": data.fingerprint, **data_facts(plan)},
    }
    if args.format == "deepspec":
        path = str(config.target.path)
        return DeepSpecLayout(shape.hidden_size, shape.target_layer_ids, path), facts
    layout = SafetensorsLayout(
        shape.hidden_size,
        len(shape.target_layer_ids),
        args.dtype,
        shape.block_size,
        config.loss,
        with_last_hidden=config.needs_target_logits,
    )
    return layout, {**facts, **kept_facts(plan)}


def size_line(plan: Any, data: Any, writer: Any) -> str:
    """What the whole cache takes, and what DeepSpec's would."""
    from dspark_megatron.targets.stored.deepspec_layout import DeepSpecLayout

    shape, tokens = plan.shape, data.report.total_tokens
    deepspec = DeepSpecLayout(shape.hidden_size, shape.target_layer_ids, "")
    theirs = sum(deepspec.entry(data[i]).nbytes for i in range(len(data)))
    return (
        f"cache of {len(data):,} samples with {tokens:,} tokens: {writer.nbytes / 2**30:,.3f} GiB, "
        f"{writer.nbytes / tokens:,.0f} bytes a token; DeepSpec's layout (bf16): "
        f"{theirs / 2**30:,.3f} GiB, {theirs / tokens:,.0f} bytes a token; "
        f"{writer.nbytes / theirs:.1%} of it"
    )


def checked_target(plan: Any, runtime: Any, data: Any) -> Any:
    """The target, whose teacher logits are checked as a training run would."""
    from dspark_megatron.run.build import build_target, read_target_head
    from dspark_megatron.targets.start_checks import check_target_logits

    config = plan.config
    target = build_target(plan, runtime, with_last_hidden=config.needs_target_logits)
    if config.target.check_logits and config.needs_target_logits:
        head, shard = read_target_head(plan, target, tp_group=runtime.tp_group)
        first = data[0].input_ids[None]
        check_target_logits(target, config.target.path, head, shard, first)
    return target


if __name__ == "__main__":
    main()
