"""The section `evaluate`."""

from dataclasses import dataclass, field
from typing import Literal

from dspark_megatron.config.rules import positive
from dspark_megatron.errors import require

Weights = Literal["trained", "ema"]
"""Of a checkpoint: as the last step left them, or their moving average."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """Real speculative decoding of prompt files, and estimates on held-out answers in training."""

    prompt_files: list[str] = field(default_factory=list)
    """Files in the forms of data.train_files, or the sets `chat`, `maths` and `code`, which come
    with the package. Each line or row has `messages`, `turns` (the first one is used) or
    `prompt`."""
    checkpoint: str = ""
    """A run folder, checkpoint folder or `iter_*` folder, or the folder of a draft in any layout.
    Empty means train.output_dir."""
    untrained: bool = False
    """Evaluate the draft as it is before the first step: made from train.seed and, if it starts
    from them, the target's layers."""
    temperature: float = 1.0
    """Sampling temperature of target and draft. 0 is greedy."""
    max_new_tokens: int = 256
    """The most tokens that are generated for a prompt."""
    max_prompts: int | None = None
    """How many prompts of each file are used, from its start. Null means all."""
    max_prompt_length: int = 4096
    """Prompts with more tokens than this are refused."""
    batch_size: int = 8
    """Prompts that a data-parallel rank decodes at the same time. When one ends, the next takes its
    place."""
    compare_plain: bool = True
    """Decode the same prompts without the draft as well, to report the speed-up."""
    context_edges: list[int] = field(
        default_factory=lambda: [4096, 8192, 16384, 32768, 65536, 131072]
    )
    """Where the lengths of context are parted by which acceptance is also given: each round counts
    by the tokens before its anchor."""
    scheduler: Literal["none", "early_stopping", "lagged_budget"] = "none"
    """How much of each draft is verified. `none` verifies all of it. The others decide by the
    confidence head and `sps_table`: `early_stopping` is Algorithm 1, `lagged_budget` is what
    engines run."""
    sps_table: str = ""
    """JSON table of steps per second by verified tokens, from `dspark served measure` or SGLang."""
    temperatures: str = ""
    """Folder with the `dspark_sts.json` of a calibration, for the scheduler. Empty means that all
    temperatures are 1."""
    seed: int = 980406
    """Seed of the sampling. The results of a prompt do not depend on the layout."""
    output: str = ""
    """JSON file for the results. Empty means train.output_dir/evaluation.json."""
    records: str = ""
    """Safetensors file that keeps every draft and its outcome. Calibration and the serving
    simulation read it. Empty means that none is written."""
    best: bool = False
    """Evaluate the checkpoint with the best held-out tau instead of the newest one."""
    weights: Weights = "trained"
    """Which weights of the draft are evaluated, in training too. `ema`: their moving average
    (`optimizer.ema_decay`)."""
    heldout_files: list[str] = field(default_factory=list)
    """Files of answers that are not trained on, in the forms of data.train_files."""
    heldout_samples: int | None = None
    """How many of their samples are used, from the start. Null means all."""
    every: int | None = None
    """Steps between estimates of tau on the held-out answers, at `temperature`. There is one after
    the last step, too. The best one so far saves a checkpoint, which is kept. Null means that
    there are none."""

    def validate(self) -> None:
        require(
            not (self.best and self.untrained),
            "evaluate.best and evaluate.untrained name two drafts; set either to false",
        )
        require(
            not (self.checkpoint and self.untrained),
            f"evaluate.checkpoint ({self.checkpoint}) and evaluate.untrained name two drafts; give "
            "one of them",
        )
        require(
            not (self.untrained and self.weights == "ema"),
            "evaluate.untrained has no moving average yet; set evaluate.weights=trained",
        )
        require(
            (self.every is None) != bool(self.heldout_files),
            f"evaluate.every ({self.every}) and evaluate.heldout_files ({self.heldout_files}) go "
            "together: estimates every so many steps on these answers, or neither",
        )
        require(
            self.temperature >= 0,
            f"evaluate.temperature ({self.temperature}) must be >= 0 (0 is greedy)",
        )
        positive("evaluate", self, "max_new_tokens", "max_prompt_length", "batch_size")
        positive("evaluate", self, "max_prompts", "heldout_samples", "every")
        edges = self.context_edges
        require(
            all(a < b for a, b in zip([0, *edges], edges, strict=False)),
            f"evaluate.context_edges ({edges}) must be lengths > 0, strictly increasing",
        )
        require(
            (self.scheduler == "none") != bool(self.sps_table),
            f"evaluate.scheduler ({self.scheduler!r}) and evaluate.sps_table ({self.sps_table!r}) "
            "go together: name a table to schedule by, or neither",
        )
        require(
            not self.temperatures or self.scheduler != "none",
            f"evaluate.temperatures ({self.temperatures!r}) is for a scheduler, and "
            "evaluate.scheduler is 'none'",
        )
