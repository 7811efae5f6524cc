"""How large an offline cache of the target's states would be."""

from dspark_megatron.training.setup import RunPlan

STATE_BYTES = 2
"""Of a number: the cache holds bf16."""
TOKEN_BYTES = 4 + 1 + 1
"""An id, the attention mask, the loss mask."""
SAMPLE_BYTES = 56
"""A sample's entry in the index."""


def cache_bytes(plan: RunPlan, samples: int) -> int:
    """Bytes of DeepSpec's cache (version 2) of samples of full length: for each token its taps and
    its last hidden state."""
    states = (len(plan.shape.target_layer_ids) + 1) * plan.shape.hidden_size * STATE_BYTES
    return samples * (plan.config.data.max_length * (states + TOKEN_BYTES) + SAMPLE_BYTES)


def cache_lines(plan: RunPlan, samples: int | None) -> list[str]:
    size = cache_bytes(plan, samples or 1)
    many = f"{samples:,} samples" if samples else "1 sample"
    return [
        f"states kept on disk instead (DeepSpec's cache, bf16): {size / 2**30:,.3f} GiB for {many} "
        f"of {plan.config.data.max_length} tokens; tools/prepare_target_cache.py says what its own "
        "layout takes of your data, and the run above computes them in every step",
    ]
