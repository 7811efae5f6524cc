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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Store the target's states.")
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
    from dspark_megatron.run.ranks.launcher import end_with_launcher

    end_with_launcher()
    from dspark_megatron.run.ranks.runtime import launch

    with launch() as job:
        from dspark_megatron.training.store_states import run

        run(job, args)


if __name__ == "__main__":
    main()
