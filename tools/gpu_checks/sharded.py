"""What one GPU cannot show."""

from gpu_checks.context import Context, Skip


def check(context: Context) -> None:
    """Always skips."""
    raise Skip(
        "a target whose weights are sharded over data-parallel ranks (target.shard) needs several "
        "GPUs: NCCL takes one rank for each"
    )
