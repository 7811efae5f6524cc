"""The work of `dspark train` on a rank."""

from argparse import Namespace
from collections.abc import Callable

from dspark_megatron.config import Config
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import printable
from dspark_megatron.run.check import check
from dspark_megatron.run.checkpoints.state import RunState
from dspark_megatron.run.identity import fix_template_day
from dspark_megatron.run.ranks.agreement import agree_at_launch
from dspark_megatron.run.ranks.facts import launch_facts
from dspark_megatron.run.ranks.places import set_time_limit
from dspark_megatron.run.ranks.runtime import Launch, start
from dspark_megatron.training.ending.stop_requests import StopRequests
from dspark_megatron.training.loop import train


def run(
    job: Launch,
    arguments: Namespace,
    stop: StopRequests,
    describe_run: Callable[[Config, int], str],
) -> RunState | None:
    """The state that the run has ended in; None where there was nothing to do. describe_run: the
    text of a dry run from a config and the number of ranks."""
    config = load_config(arguments.config, arguments.overrides)
    set_time_limit(config.train.timeout_minutes)
    if job.has_rank or not arguments.dry_run:
        facts = launch_facts(config, command="train", dry_run=arguments.dry_run)
        agree_at_launch(job, facts)
    if arguments.dry_run:
        if job.rank == 0:
            print(printable(describe_run(config, job.world_size)), flush=True)
        return None
    plan = check(config, job.world_size, use="train")
    runtime = start(job, config.parallel.tensor_parallel, shards_target=plan.shards_target)
    fix_template_day(plan, job.main_ranks)
    return train(plan, runtime, stop)
