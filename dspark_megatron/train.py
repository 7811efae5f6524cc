"""Train a drafter: `torchrun --nproc-per-node N -m dspark_megatron.train --config FILE ...`."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark_megatron.training.stop_requests import StopRequests

# Nothing heavy is imported here: signals are taken up first, and megatron must not be imported
# before the CPU support is installed.


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a DSpark drafter.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, layout, parameters and memory per rank; train nothing",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    from dspark_megatron.training.stop_requests import stop_requests

    with stop_requests() as stop:  # before the slow imports: from here on no signal is lost
        run(arguments, stop)


def run(arguments: argparse.Namespace, stop: "StopRequests") -> None:
    from dspark_megatron.run.runtime import launch, start

    with launch() as job:
        from dspark_megatron.config.loading import load_config
        from dspark_megatron.run.agreement import agree_at_launch
        from dspark_megatron.run.check import check_run, check_training_device
        from dspark_megatron.run.rank_facts import launch_facts
        from dspark_megatron.shape.layout import check_batch_size
        from dspark_megatron.targets.huggingface.quantization import check_quantization

        config = load_config(arguments.config, arguments.overrides)
        facts = launch_facts(config, command="train", dry_run=arguments.dry_run)
        agree_at_launch(job, facts)
        if arguments.dry_run:
            from dspark_megatron.planning.dry_run import describe_run

            if job.rank == 0:
                print(describe_run(config, job.world_size), flush=True)
            return
        plan = check_run(config, job.world_size)
        check_batch_size(config.train, plan.dp_size)
        check_training_device(config)
        shards_target = False
        if not config.target.is_stored:
            check_quantization(plan.target_config, plan.target_split)
            shards_target = plan.target_split.lockstep
        runtime = start(job, config.parallel.tensor_parallel, shards_target=shards_target)
        from dspark_megatron.run.template_day import fix_template_day
        from dspark_megatron.training.loop import train

        fix_template_day(plan, job.main_ranks)
        train(plan, runtime, stop)


if __name__ == "__main__":
    main()
