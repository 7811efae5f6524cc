"""The section `train`."""

from dataclasses import dataclass

from dspark_megatron.config.rules import one_of, positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class TrainConfig:
    """The run."""

    output_dir: str = ""
    """Folder of the run: metrics, TensorBoard, checkpoints, exports."""
    iterations: int | None = None
    """Optimizer steps, whatever their batch sizes. Give this or `epochs`."""
    epochs: float | None = None
    """Passes over the kept samples, whatever the batch sizes. Give this or `iterations`."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one data-parallel rank."""
    global_batch_size: int = 8
    """Samples of one optimizer step; divisible by micro_batch_size * data-parallel size."""
    dtype: str = "bfloat16"
    """Draft weights in the forward pass: `bfloat16` (with fp32 main weights) or `float32`."""
    recompute_activations: bool = False
    """Keep only the inputs of draft layers and compute the rest again in the backward pass."""
    seed: int = 1234
    """Seeds data order, anchors and initial weights, whatever the layout."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    exit_duration_minutes: float | None = None
    """Minutes since the launch after which the run ends its step, saves and exits, as on SIGTERM;
    null: no limit."""
    keep_last: int = 3
    """Checkpoints kept, beside the best; older ones are deleted after a newer one is complete."""
    resume: bool = True
    """Continue from the newest checkpoint of output_dir when there is one."""
    resume_from: int | None = None
    """Continue from the checkpoint of this iteration of output_dir instead, and from the newest
    again once the run has saved one from there. Null: the newest."""
    initial_checkpoint: str = ""
    """Weights to start from, with a fresh optimizer: a run, its checkpoint, an import, or the
    folder of a draft in any layout. Not looked at when the run continues."""
    tensorboard: bool = True
    """Write TensorBoard events to output_dir/tensorboard."""

    def check_given(self) -> None:
        """What training needs."""
        require(bool(self.output_dir), "train.output_dir is missing")
        require(
            (self.iterations is None) != (self.epochs is None),
            f"give exactly one of train.iterations ({self.iterations}) "
            f"and train.epochs ({self.epochs})",
        )

    def validate(self) -> None:
        for name in ("iterations", "epochs"):
            if getattr(self, name) is not None:
                positive(f"train.{name}", getattr(self, name))
        for name in ("micro_batch_size", "global_batch_size", "log_every", "save_every"):
            positive(f"train.{name}", getattr(self, name))
        positive("train.keep_last", self.keep_last)
        require(
            self.resume_from is None or (self.resume and self.resume_from >= 0),
            f"train.resume_from ({self.resume_from}) must be the iteration (>= 0) of a checkpoint, "
            f"with train.resume=true (it is {str(self.resume).lower()})",
        )
        if self.exit_duration_minutes is not None:
            positive("train.exit_duration_minutes", self.exit_duration_minutes)
        one_of("train.dtype", self.dtype, ("bfloat16", "float32"))
        require(self.seed >= 0, f"train.seed ({self.seed}) must be >= 0")
