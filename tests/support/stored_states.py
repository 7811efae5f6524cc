"""Options of the tool that stores states."""

import os
from pathlib import Path
from unittest import mock

import pytest


class InterruptedJob(Exception):
    pass


def prepare(runtime, config, output, *options, stop_after=None):
    """What the tool does in a rank; stop_after: shards after which the writer fails."""
    import prepare_target_cache as tool

    from dspark_megatron.run.check import check
    from dspark_megatron.training.store_states import store_states

    args = tool.parse_arguments(["--config", "unused", "--shard-mib", "0.07", *options])
    plan = check(config, runtime.world_size)
    if stop_after is None:
        store_states(plan, runtime, Path(output), args)
        return
    left, replace = iter(range(stop_after)), os.replace

    def failing(source, destination):
        if str(destination).endswith(".safetensors") and "shard" in str(destination):
            if next(left, None) is None:
                raise InterruptedJob  # the shard is written and not in place
        replace(source, destination)

    with mock.patch("os.replace", failing), pytest.raises(InterruptedJob):
        store_states(plan, runtime, Path(output), args)


def prepare_options(runtime, config, output, stop_after=None, **options):
    pairs = [part for name, value in options.items() for part in (f"--{name}", value)]
    prepare(runtime, config, output, *pairs, stop_after=stop_after)
