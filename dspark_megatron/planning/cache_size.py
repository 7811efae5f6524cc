"""How large an offline cache of the target's states would be."""

from dspark_megatron.targets.deepspec_cache import RECORD, DeepSpecLayout
from dspark_megatron.training.setup import RunPlan


def cache_bytes(plan: RunPlan, samples: int) -> int:
    """Bytes of DeepSpec's cache (version 2) of samples of full length, its index included."""
    layout = DeepSpecLayout(plan.shape.hidden_size, plan.shape.target_layer_ids, "")
    return samples * (layout.sample_bytes(plan.config.data.max_length) + RECORD.size)


def cache_lines(plan: RunPlan, samples: int | None) -> list[str]:
    size = cache_bytes(plan, samples or 1)
    many = f"{samples:,} samples" if samples else "1 sample"
    return [
        f"states kept on disk instead (DeepSpec's cache, bf16): {size / 2**30:,.3f} GiB for {many} "
        f"of {plan.config.data.max_length} tokens; tools/prepare_target_cache.py says what its own "
        "layout takes of your data, and the run above computes them in every step",
    ]
