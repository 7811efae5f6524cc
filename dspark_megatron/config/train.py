"""The sections `train` and `storage`: a run, and how what it reads again is checked."""

from dataclasses import dataclass
from typing import Literal

from dspark_megatron.config.rules import not_negative, positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batches, seed and files of a run."""

    output_dir: str = ""
    """Folder of the run: metrics, TensorBoard, checkpoints, exports."""
    iterations: int | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = None
    """Passes over the kept samples, whatever the batch sizes. Give this or `iterations`."""
    micro_batch_size: int = 1
    """Samples in one forward pass of a data-parallel rank."""
    global_batch_size: int = 8
    """Samples in one optimizer step. Divisible by micro_batch_size * data-parallel size."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the draft's weights in the forward pass: `bfloat16` (with fp32 main weights) or
    `float32`."""
    recompute_activations: bool = False
    """Keep only the inputs of the draft's layers and compute the rest again in the backward
    pass."""
    seed: int = 1234
    """Seed of data order, anchors and initial weights. They do not depend on the layout."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints. The last step is always saved."""
    async_save: bool = False
    """Copy what is to be saved to host memory and write it while the run goes on. Each rank then
    needs host memory for its part of a checkpoint. The last checkpoint of a start is waited for."""
    exit_duration_minutes: float | None = None
    """Minutes since the launch after which the run ends its step, saves and exits, as it does on
    SIGTERM. Null means no limit."""
    timeout_minutes: float = 10.0
    """Minutes that ranks wait for one that does not come: at the rendezvous, when they compare
    settings, and in a step. Six times as long while data and target are loaded, and in a save. Then
    the run ends and names the rank, its host and where it was."""
    keep_last: int = 3
    """Checkpoints that are kept besides the best one. Older ones are deleted once a newer one is
    complete."""
    resume: bool = True
    """Continue from the newest checkpoint of output_dir if there is one."""
    resume_from: int | None = None
    """Continue from the checkpoint of this iteration of output_dir instead. Once the run has saved
    a checkpoint after that, it continues from the newest again. Null means the newest."""
    overwrite: bool = False
    """With `resume: false`, start anew in a folder that has checkpoints: they are moved to
    checkpoints/replaced_1 (or 2, ...) when the new run takes its first step. The same command
    starts anew every time; leave this out to continue."""
    initial_checkpoint: str = ""
    """Weights to start from, with a fresh optimizer: a run, its checkpoint, an import, or the
    folder of a draft in any layout. A run that continues ignores this."""
    initial_rope: Literal["same", "other"] = "same"
    """Whether the RoPE of `initial_checkpoint` must be this run's. With `other` it may differ, and
    the run trains and exports its own: the second stage of a draft for long contexts."""
    max_skipped_steps: int = 10
    """Of the last 100 steps of a start, how many may be skipped because their gradients or loss are
    not finite, or their gradient norm is above the next key. One more ends the run with an error,
    after it was saved: started again it continues behind the bad samples."""
    skip_gradient_norm_above: float | None = None
    """A step whose gradient norm, before clipping, is above this is skipped, too. Null means no
    bound."""
    tensorboard: bool = True
    """Write TensorBoard events to output_dir/tensorboard."""

    def validate(self) -> None:
        positive("train", self, "iterations", "epochs", "micro_batch_size", "global_batch_size")
        positive("train", self, "log_every", "save_every", "keep_last", "exit_duration_minutes")
        positive("train", self, "timeout_minutes")
        require(
            self.resume_from is None or (self.resume and self.resume_from >= 0),
            f"train.resume_from ({self.resume_from}) must be the iteration (>= 0) of a checkpoint, "
            f"with train.resume=true (it is {str(self.resume).lower()})",
        )
        require(
            not (self.overwrite and self.resume),
            "train.overwrite=true starts anew in a folder that has checkpoints, and train.resume "
            "is true; set train.resume=false to lose them, or train.overwrite=false to go on",
        )
        positive("train", self, "skip_gradient_norm_above")
        not_negative("train", self, "seed", "max_skipped_steps")


@dataclass(kw_only=True)
class StorageConfig:
    """How checkpoints and stored states are checked when a run opens them."""

    verify: Literal["size", "full"] = "size"
    """`size`: every file is there and as long as it was saved, and small ones have their checksums.
    `full`: every byte is read and compared with the checksums before anything else starts. Stored
    states are compared in full in the background of the first epoch either way."""

    def validate(self) -> None:
        """Its choices are all there is to check."""
