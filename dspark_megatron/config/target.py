"""The section `target`."""

from dataclasses import dataclass

from dspark_megatron.config.rules import one_of, positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class TargetConfig:
    """The frozen model that the drafter is trained for."""

    path: str = ""
    """Folder with the target's `config.json`, safetensors and tokenizer."""
    provider: str = "huggingface"
    """Where its states come from. `huggingface`: the target, split by Transformers' native tensor
    parallelism. `megatron`: a Megatron-Core GPTModel, of Llama, Qwen2, Qwen3 and Qwen3-MoE.
    `cache`: the folder `cache`, and no target is loaded."""
    checkpoint: str = ""
    """For provider `megatron`: a Megatron-LM checkpoint (a folder with
    `latest_checkpointed_iteration.txt`, or an `iter_*` or `release` folder in it) that the target's
    weights come from, whatever layout wrote it; `path` then needs no safetensors. For `cache`: the
    same, where the cache was written with it."""
    cache: str = ""
    """Folder of states that `tools/prepare_target_cache.py` has written, or of DeepSpec's cache
    (version 2)."""
    dtype: str = "auto"
    """`auto` (as saved), `float32`, `bfloat16` or `float16`."""
    attention: str = "sdpa"
    """Transformers' attention implementation for the target: `sdpa`, `eager`,
    `flash_attention_2`, ..."""
    shard_across_data_parallel: int = 1
    """Data-parallel ranks that share one copy of the target's weights: each holds a part of its
    tensor-parallel slice, and a layer is whole only while it runs. 1: none do; a divisor of the
    data-parallel size; 0: all of them."""
    max_tokens_per_forward: int | None = None
    """Tokens that one forward pass of the target takes at most in training: a larger micro-batch
    goes through it in several passes, a longer sample in pieces with a key/value cache. Null: all
    at once."""
    packing: bool = False
    """Put the samples of a micro-batch behind one another in rows of a forward pass in training,
    without padding: the same states, where the target's family keeps the samples of a row apart,
    which is tried at start."""
    check_logits: bool = True
    """Compare `lm_head(last_hidden)` with the target's own logits on the first batch at start."""

    def validate(self) -> None:
        require(bool(self.path), "target.path is missing; set it to the target's folder")
        one_of("target.provider", self.provider, ("huggingface", "megatron", "cache"))
        require(
            bool(self.cache) or not self.is_stored,
            "target.provider 'cache' needs target.cache: name the folder that "
            "tools/prepare_target_cache.py has written, or set target.provider=huggingface",
        )
        one_of("target.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        require(
            self.shard_across_data_parallel >= 0,
            f"target.shard_across_data_parallel ({self.shard_across_data_parallel}) must be >= 0 "
            "(1: no sharding, 0: over all data-parallel ranks)",
        )
        require(
            not self.checkpoint or self.provider != "huggingface",
            f"target.checkpoint ({self.checkpoint}) is read by target.provider=megatron, and for a "
            f"cache of its states (here: {self.provider}); set that, or leave it empty",
        )
        if self.provider == "megatron":
            self._validate_megatron()
        require(
            not self.packing or not self.is_stored,
            "target.packing is of a target's forward pass, and target.provider 'cache' makes none; "
            "set target.packing=false",
        )
        if self.max_tokens_per_forward is not None:
            positive("target.max_tokens_per_forward", self.max_tokens_per_forward)

    def _validate_megatron(self) -> None:
        require(
            self.attention == "sdpa",
            f"target.attention ({self.attention!r}) is for target.provider=huggingface; leave it "
            "at 'sdpa', since a GPTModel has its own attention",
        )
        require(
            self.shard_across_data_parallel == 1,
            f"target.shard_across_data_parallel ({self.shard_across_data_parallel}) must be 1 for "
            "target.provider=megatron, whose weights are split by tensor and expert parallelism; "
            "raise parallel.tensor_parallel, or set target.provider=huggingface",
        )
        require(
            not self.packing,
            "target.packing is for target.provider=huggingface; set target.packing=false",
        )

    @property
    def is_stored(self) -> bool:
        """Whether states are read, and the target itself is not loaded."""
        return self.provider == "cache"
