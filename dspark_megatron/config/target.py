"""The section `target`."""

from dataclasses import dataclass
from typing import Literal

from dspark_megatron.config.rules import positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class TargetConfig:
    """The frozen model that the draft is trained for."""

    path: str = ""
    """Folder with the target's `config.json`, safetensors and tokenizer."""
    provider: Literal["huggingface", "megatron", "cache"] = "huggingface"
    """Where the target's states come from. `huggingface` runs the target, split by Transformers'
    native tensor parallelism. `megatron` runs it as a Megatron-Core GPTModel (Llama, Qwen2, Qwen3
    and Qwen3-MoE). `cache` reads stored states from the folder `cache` and loads no target."""
    checkpoint: str = ""
    """A Megatron-LM checkpoint with the target's weights, for provider `megatron`: a folder with
    `latest_checkpointed_iteration.txt`, or an `iter_*` or `release` folder in it, written by any
    layout. `path` then needs no safetensors. For provider `cache` give the same one, if the states
    were stored with it."""
    cache: str = ""
    """Folder of stored states, written by `dspark cache` or as DeepSpec's cache
    (version 2)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the target: `auto` (as saved), `float32`, `bfloat16` or `float16`."""
    attention: str = "sdpa"
    """Transformers' attention implementation for the target: `sdpa`, `eager`,
    `flash_attention_2`, ..."""
    shard_across_data_parallel: int = 1
    """Data-parallel ranks that share one copy of the target's weights. Each holds a part of its
    tensor-parallel slice, and a layer is gathered only while it runs. 1 means no sharing, 0 means
    all data-parallel ranks; else it must divide their number."""
    samples_per_pass: int | None = None
    """The most samples of a step, in whole micro-batches, that a rank's target takes in one forward
    pass; at least `train.micro_batch_size`. Their states wait in memory for their micro-batches.
    More of them keep a GPU busier, and a target that is sharded is gathered once for all of them.
    Null means as many as `pass_memory_gib` holds."""
    pass_memory_gib: float = 1.0
    """GiB that the states of a pass may take, twice over, with `samples_per_pass` null, counted for
    samples of `data.max_length` tokens. What the target's layers take while they run is not in it.
    One micro-batch goes through in any case."""
    max_tokens_per_forward: int | None = None
    """The most tokens in one forward pass of the target in training. More are cut into several
    passes, and a longer sample into pieces with a key/value cache; each of them gathers a sharded
    target anew. Null means no limit."""
    packing: bool = False
    """Pack the samples of a pass into sequences without padding for the target's forward pass in
    training. The states stay the same if the target's family keeps packed samples apart,
    which is tried at start."""
    check_logits: bool = True
    """Compare `lm_head(last_hidden)` with the target's own logits on the first batch."""

    def validate(self) -> None:
        require(bool(self.path), "target.path is missing; set it to the target's folder")
        require(
            bool(self.cache) or not self.is_stored,
            "target.provider 'cache' needs target.cache: name the folder that "
            "`dspark cache` has written, or set target.provider=huggingface",
        )
        require(
            self.shard_across_data_parallel >= 0,
            f"target.shard_across_data_parallel ({self.shard_across_data_parallel}) must be >= 0 "
            "(1: no sharding, 0: over all data-parallel ranks)",
        )
        require(
            not self.checkpoint or self.provider != "huggingface",
            f"target.checkpoint ({self.checkpoint}) is read by target.provider=megatron, and names "
            f"the weights of stored states (here: {self.provider}); set that, or leave it empty",
        )
        if self.provider == "megatron":
            self._validate_megatron()
        require(
            not self.packing or not self.is_stored,
            "target.packing is for a target's forward pass, and target.provider 'cache' makes "
            "none; set target.packing=false",
        )
        require(
            self.samples_per_pass is None or not self.is_stored,
            f"target.samples_per_pass ({self.samples_per_pass}) is for a target's forward pass, "
            "and target.provider 'cache' makes none; set target.samples_per_pass=null",
        )
        positive("target", self, "max_tokens_per_forward", "samples_per_pass", "pass_memory_gib")

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
        """Whether states are read from disk, so that the target itself is not loaded."""
        return self.provider == "cache"
