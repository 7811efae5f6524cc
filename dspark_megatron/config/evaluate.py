"""The section `evaluate`."""

from dataclasses import dataclass, field

from dspark_megatron.config.rules import one_of, positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class EvaluateConfig:
    """Real speculative decoding of prompt files, and its estimate from answers while training."""

    prompt_files: list[str] = field(default_factory=list)
    """JSONL files; each line has `messages`, `turns` (the first is used) or `prompt`."""
    checkpoint: str = ""
    """Run folder, checkpoint folder or `iter_*` folder; empty means train.output_dir."""
    untrained: bool = False
    """Evaluate the draft as it is before the first step, from train.seed and, where it starts from
    them, the target's layers."""
    temperature: float = 1.0
    """Sampling temperature of target and draft; 0 is greedy."""
    max_new_tokens: int = 256
    """Tokens generated per prompt, at most."""
    max_prompts: int | None = None
    """Prompts used of each file, from its start; null means all."""
    max_prompt_length: int = 4096
    """Prompts longer than this many tokens are refused."""
    batch_size: int = 8
    """Prompts that each data-parallel rank decodes at one time; one that is done makes room for the
    next."""
    compare_plain: bool = True
    """Decode the same prompts without the draft too, to report the speed-up."""
    scheduler: str = "none"
    """How much of each draft is verified: all of it (`none`), or what pays by the confidence head
    and `sps_table`: `early_stopping` (Algorithm 1) or `lagged_budget` (as engines run it)."""
    sps_table: str = ""
    """JSON table of steps per second by verified tokens, from tools/measure_sps.py or SGLang."""
    temperatures: str = ""
    """Folder with the `dspark_sts.json` of a calibration, for the scheduler; empty: all 1."""
    seed: int = 980406
    """Seeds the sampling of each prompt, whatever the layout."""
    output: str = ""
    """JSON file for the results; empty means train.output_dir/evaluation.json."""
    records: str = ""
    """Safetensors file for every draft and what became of it, which calibration and the serving
    simulation read; empty: none."""
    best: bool = False
    """Evaluate the checkpoint of the best held-out tau, not the newest."""
    heldout_files: list[str] = field(default_factory=list)
    """JSONL files of answers that are not trained on, in the forms of data.train_files."""
    heldout_samples: int | None = None
    """Samples used of them, from the start; null means all."""
    every: int | None = None
    """Train steps between estimates of tau on the held-out answers, at `temperature`; the last step
    has one too. Null: none. The best one so far saves a checkpoint, which is kept."""

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
            (self.every is None) != bool(self.heldout_files),
            f"evaluate.every ({self.every}) and evaluate.heldout_files ({self.heldout_files}) go "
            "together: estimates every so many steps on these answers, or neither",
        )
        require(
            self.temperature >= 0,
            f"evaluate.temperature ({self.temperature}) must be >= 0 (0 is greedy)",
        )
        for name in ("max_new_tokens", "max_prompt_length", "batch_size"):
            positive(f"evaluate.{name}", getattr(self, name))
        for name in ("max_prompts", "heldout_samples", "every"):
            if getattr(self, name) is not None:
                positive(f"evaluate.{name}", getattr(self, name))
        schedulers = ("none", "early_stopping", "lagged_budget")
        one_of("evaluate.scheduler", self.scheduler, schedulers)
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
