"""Every knob of a run, once: its default, meaning, unit and the checks that need nothing else.

`config_file.py` reads them from YAML. Rules that need the target's own shape are in `shape.py`.
"""

import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from typing import Any

import yaml


class ConfigError(ValueError):
    """The user's settings cannot work; the message says what must hold and the way out."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(kw_only=True)
class TargetConfig:
    """The frozen model that the drafter is trained for."""

    path: str = ""
    """Folder with the target's `config.json`, safetensors and tokenizer."""
    provider: str = "huggingface"
    """Who loads and splits the target. `huggingface`: Transformers' native tensor parallelism."""
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
    check_teacher_logits: bool = True
    """Compare `lm_head(last_hidden)` with the target's own logits on the first batch at start."""

    def validate(self) -> None:
        require(bool(self.path), "target.path is missing; set it to the target's folder")
        _one_of("target.provider", self.provider, ("huggingface",))
        _one_of("target.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        require(
            self.shard_across_data_parallel >= 0,
            f"target.shard_across_data_parallel ({self.shard_across_data_parallel}) must be >= 0 "
            "(1: no sharding, 0: over all data-parallel ranks)",
        )
        if self.max_tokens_per_forward is not None:
            _positive("target.max_tokens_per_forward", self.max_tokens_per_forward)


@dataclass(kw_only=True)
class ModelConfig:
    """The draft model. Widths left at null are the target's."""

    num_layers: int = 5
    """Draft decoder layers."""
    block_size: int = 7
    """Draft positions of one anchor (k); the anchor's own token is the first input."""
    num_anchors: int = 512
    """Anchors sampled per sample, at most."""
    target_layer_ids: list[int] = field(default_factory=list)
    """Target layers whose outputs feed the draft: 0-based decoder layers, strictly increasing,
    in [0, N-2]. Layer i is Transformers' `hidden_states[i + 1]`."""
    mask_token_id: int | None = None
    """Token id fed at the positions after the anchor. Required; neither pad nor eos."""
    markov_rank: int = 256
    """Width of the Markov head (r); 0 means no Markov head."""
    markov_head_type: str = "vanilla"
    """`vanilla`, `gated` or `rnn`."""
    enable_confidence_head: bool = True
    """Train a head that predicts the chance that a draft token is kept."""
    confidence_head_with_markov: bool = True
    """Give the confidence head the previous token's Markov embedding as well."""
    ffn_hidden_size: int | None = None
    """Width of the draft's SwiGLU layers."""
    num_attention_heads: int | None = None
    """Query heads of the draft."""
    num_key_value_heads: int | None = None
    """Key/value heads of the draft."""
    head_dim: int | None = None
    """Width of one attention head of the draft."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; biases start at zero, norms at one."""
    backend: str = "local"
    """Classes of the draft's layers: `local` (Megatron-Core's own and PyTorch's RMSNorm, any
    device), `transformer_engine` (needs the package and a GPU) or `auto` (the latter where it can
    run). The same parameters and checkpoints."""
    attention_backend: str = "sdpa"
    """Attention of the draft in training: `sdpa` (grouped, any device) or `flex` (FlexAttention
    with a block mask; GPUs only)."""
    attention_group_size: int = 16
    """Blocks that share one attention call of `sdpa`; bounds the mask to
    [group * k, context + group * k]."""

    def validate(self) -> None:
        for name in ("num_layers", "block_size", "num_anchors", "attention_group_size"):
            _positive(f"model.{name}", getattr(self, name))
        _one_of("model.markov_head_type", self.markov_head_type, ("vanilla", "gated", "rnn"))
        _one_of("model.backend", self.backend, ("local", "transformer_engine", "auto"))
        _one_of("model.attention_backend", self.attention_backend, ("sdpa", "flex"))
        require(self.markov_rank >= 0, f"model.markov_rank ({self.markov_rank}) must be >= 0")
        require(
            not (self.enable_confidence_head and self.confidence_head_with_markov)
            or self.markov_rank > 0,
            "model.confidence_head_with_markov needs a Markov head: set model.markov_rank > 0 "
            "or model.confidence_head_with_markov=false",
        )
        _positive("model.initializer_range", self.initializer_range)
        for name in ("ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None:
                _positive(f"model.{name}", getattr(self, name))


@dataclass(kw_only=True)
class LossConfig:
    """Weights and form of the training objective (paper Eq. 9-12)."""

    preset: str = "deepspec"
    """Whose semantics the keys left out take: `deepspec` (the paper's checkpoints), `modelopt` or
    `speculators`; `loss_presets.py` has them."""
    ce_loss_alpha: float = 0.1
    """Weight of the cross entropy with the labels."""
    l1_loss_alpha: float = 0.9
    """Weight of the raw L1 distance (0..2) to the target's distribution."""
    tvd_loss_alpha: float = 0.0
    """Weight of the total variation distance, half of L1: the same term in speculators' unit.
    Naming one of the two sets the other to 0."""
    kl_loss_alpha: float = 0.0
    """Weight of the forward divergence KL(target || draft) in nats."""
    confidence_head_alpha: float = 1.0
    """Weight of the confidence head's binary cross entropy."""
    loss_decay_gamma: float | None = 4.0
    """Slot k weighs exp(-k / loss_decay_gamma), k from 0; null means no decay."""
    ce_labels: str = "data"
    """Labels of the cross entropy: `data` (the next token) or `target_argmax` (the token that the
    target holds most likely there)."""
    anchor_rule: str = "label"
    """Positions that may be anchors: `label` (a token in the loss mask whose next one is too) or
    `token` (any token in the loss mask; a block may then have no supervised slot)."""
    supervised_slots: str = "prefix"
    """Slots of a block that are learnt: `prefix` (up to the first that the mask leaves out) or
    `all` (also those after a gap)."""
    slot_mask: str = "label"
    """Whose place in the loss mask decides on a slot: its `label`'s or its `input`'s, one before
    (then one token past the end of an answer is learnt)."""
    normalization: str = "global_step"
    """`global_step`: sums over all samples of the step, divided once by the sum of weights.
    `deepspec`: a mean over micro-batches of their own weighted means.
    `local`: a mean over micro-batches and data-parallel ranks of each one's own weighted mean.
    `local_count`: as `local`, divided by the number of supervised slots, not by their weights.
    With all but the first, the layout is part of the mathematics."""
    memory_budget_mb: int = 256
    """MiB that the logits of the head loss may take on a rank; sets the rows of a chunk. The room
    of its elementwise passes (tens of MiB) and the gradient of `markov_w2` are not in it."""
    chunk_rows: int | None = None
    """Rows whose logits exist at one time in the head loss; null: as many as the budget holds."""
    compile: bool = False
    """Fuse the elementwise part of the head loss with torch.compile."""

    def validate(self) -> None:
        _one_of("loss.preset", self.preset, ("deepspec", "modelopt", "speculators"))
        names = ("ce_loss", "l1_loss", "tvd_loss", "kl_loss", "confidence_head")
        for name in (f"{name}_alpha" for name in names):
            value = getattr(self, name)
            require(value >= 0, f"loss.{name} ({value}) must be >= 0")
        require(
            not (self.l1_loss_alpha and self.tvd_loss_alpha),
            f"loss.l1_loss_alpha ({self.l1_loss_alpha}) and loss.tvd_loss_alpha "
            f"({self.tvd_loss_alpha}) weigh one term (tvd is half of l1); set either to 0",
        )
        require(
            self.loss_decay_gamma is None or self.loss_decay_gamma > 0,
            f"loss.loss_decay_gamma ({self.loss_decay_gamma}) must be > 0, or null for no decay",
        )
        _one_of("loss.ce_labels", self.ce_labels, ("data", "target_argmax"))
        _one_of("loss.anchor_rule", self.anchor_rule, ("label", "token"))
        _one_of("loss.supervised_slots", self.supervised_slots, ("prefix", "all"))
        _one_of("loss.slot_mask", self.slot_mask, ("label", "input"))
        forms = ("global_step", "deepspec", "local", "local_count")
        _one_of("loss.normalization", self.normalization, forms)
        _positive("loss.memory_budget_mb", self.memory_budget_mb)
        if self.chunk_rows is not None:
            _positive("loss.chunk_rows", self.chunk_rows)

    @property
    def l1_weight(self) -> float:
        """Weight of the raw L1 distance, whichever name it was given under."""
        return self.l1_loss_alpha + self.tvd_loss_alpha / 2

    def needs_teacher(self, *, with_confidence_head: bool) -> bool:
        """Whether any term compares with the target's distribution."""
        return (
            self.l1_weight > 0
            or self.kl_loss_alpha > 0
            or self.ce_labels == "target_argmax"
            or (with_confidence_head and self.confidence_head_alpha > 0)
        )


@dataclass(kw_only=True)
class DataConfig:
    """Training conversations."""

    train_files: list[str] = field(default_factory=list)
    """JSONL files; each line has `messages` (chat) or `input_ids` with `loss_mask`."""
    max_length: int = 4096
    """Tokens kept of a sample; the rest is cut off."""
    min_loss_tokens: int | None = None
    """Supervised tokens that a sample needs after truncation; null means 2 * block_size."""
    group_by_length: bool = False
    """Deal the samples of a step out to micro-batches by length, so that less is padded. The step
    learns from the same samples."""
    show_sample: bool = True
    """Print one decoded sample with its loss mask at start."""

    def validate(self) -> None:
        require(bool(self.train_files), "data.train_files is empty; name at least one JSONL file")
        require(self.max_length >= 2, f"data.max_length ({self.max_length}) must be >= 2")
        require(
            self.min_loss_tokens is None or self.min_loss_tokens >= 1,
            f"data.min_loss_tokens ({self.min_loss_tokens}) must be >= 1, "
            "or null for 2 * block_size",
        )


@dataclass(kw_only=True)
class ParallelConfig:
    """How ranks share the work. Data parallelism is what is left of the world size."""

    tensor_parallel: int = 1
    """Ranks that split the target and the draft."""
    sequence_parallel: bool = False
    """Split the rows of the draft's norms and residuals over the tensor-parallel ranks as well:
    less memory for activations, the same mathematics. On one rank there is nothing to split."""
    expert_parallel: int = 1
    """Ranks over which the experts of a mixture-of-experts target are spread, whole ones on each;
    1: every expert is split over the tensor-parallel ranks. A multiple of tensor_parallel that
    divides tensor_parallel x target.shard_across_data_parallel and the number of experts."""
    context_parallel: int = 1
    """Always 1: a sample stays whole on its ranks."""

    def validate(self) -> None:
        size = self.context_parallel
        _positive("parallel.tensor_parallel", self.tensor_parallel)
        require(
            size == 1,
            f"parallel.context_parallel ({size}) must be 1: samples are not split. "
            "For long ones set target.max_tokens_per_forward, parallel.sequence_parallel=true and "
            "train.micro_batch_size=1",
        )
        _positive("parallel.expert_parallel", self.expert_parallel)


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of the peak."""
    warmup_ratio: float = 0.04
    """Share of the iterations over which the rate rises from peak / warm-up steps to the peak."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest gradient norm; 0 means no clipping."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state and fp32 main weights over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce a bucket of gradients over data-parallel ranks as soon as it is full, while the
    backward pass of the step's last micro-batch goes on."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the fp32 buckets inside the matrix product. Needs a GPU and Apex's
    extension `fused_weight_gradient_mlp_cuda`."""

    def validate(self) -> None:
        _positive("optimizer.lr", self.lr)
        _positive("optimizer.adam_eps", self.adam_eps)
        for name in ("min_lr_ratio", "warmup_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name} ({value}) must be in [0, 1]")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} ({value}) must be in [0, 1)")
        for name in ("weight_decay", "clip_grad"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} ({value}) must be >= 0")


@dataclass(kw_only=True)
class TrainConfig:
    """The run."""

    output_dir: str = ""
    """Folder of the run: metrics, TensorBoard, checkpoints, exports."""
    iterations: int | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = None
    """Passes over the kept samples. Give this or `iterations`."""
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
    initial_checkpoint: str = ""
    """Weights to start from, with a fresh optimizer: a run, its checkpoint, an import, or the
    folder of a draft in any layout. Not looked at when the run continues."""
    tensorboard: bool = True
    """Write TensorBoard events to output_dir/tensorboard."""

    def validate(self) -> None:
        require(bool(self.output_dir), "train.output_dir is missing")
        require(
            (self.iterations is None) != (self.epochs is None),
            f"give exactly one of train.iterations ({self.iterations}) "
            f"and train.epochs ({self.epochs})",
        )
        for name in ("iterations", "epochs"):
            if getattr(self, name) is not None:
                _positive(f"train.{name}", getattr(self, name))
        for name in ("micro_batch_size", "global_batch_size", "log_every", "save_every"):
            _positive(f"train.{name}", getattr(self, name))
        _positive("train.keep_last", self.keep_last)
        if self.exit_duration_minutes is not None:
            _positive("train.exit_duration_minutes", self.exit_duration_minutes)
        _one_of("train.dtype", self.dtype, ("bfloat16", "float32"))
        require(self.seed >= 0, f"train.seed ({self.seed}) must be >= 0")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Real speculative decoding of prompt files, and its estimate from answers while training."""

    prompt_files: list[str] = field(default_factory=list)
    """JSONL files; each line has `messages`, `turns` (the first is used) or `prompt`."""
    checkpoint: str = ""
    """Run folder, checkpoint folder or `iter_*` folder; empty means train.output_dir."""
    untrained: bool = False
    """Evaluate the draft as it is before the first step, from train.seed."""
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
            self.every is None or bool(self.heldout_files),
            f"evaluate.every ({self.every}) needs answers to estimate on: name "
            "evaluate.heldout_files, or set evaluate.every=null",
        )
        require(
            self.temperature >= 0,
            f"evaluate.temperature ({self.temperature}) must be >= 0 (0 is greedy)",
        )
        for name in ("max_new_tokens", "max_prompt_length", "batch_size"):
            _positive(f"evaluate.{name}", getattr(self, name))
        for name in ("max_prompts", "heldout_samples", "every"):
            if getattr(self, name) is not None:
                _positive(f"evaluate.{name}", getattr(self, name))
        schedulers = ("none", "early_stopping", "lagged_budget")
        _one_of("evaluate.scheduler", self.scheduler, schedulers)
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


@dataclass(kw_only=True)
class Config:
    """A whole run, by section."""

    target: TargetConfig = field(default_factory=TargetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def validate(self) -> None:
        for section in dataclasses.fields(self):
            getattr(self, section.name).validate()
        loss = self.loss
        terms = ["ce_loss_alpha", "l1_loss_alpha", "tvd_loss_alpha", "kl_loss_alpha"]
        if self.model.enable_confidence_head:
            terms.append("confidence_head_alpha")
        require(
            any(getattr(loss, name) > 0 for name in terms),
            f"there is nothing to learn: one of loss.{', loss.'.join(terms)} must be > 0",
        )
        require(
            not self.optimizer.overlap_grad_reduce
            or not self.model.enable_confidence_head
            or loss.confidence_head_alpha > 0,
            "optimizer.overlap_grad_reduce waits for the gradient of every weight, and the "
            "confidence head gets none: loss.confidence_head_alpha is 0; set "
            "model.enable_confidence_head=false or optimizer.overlap_grad_reduce=false",
        )
        require(
            self.evaluate.scheduler == "none" or self.model.enable_confidence_head,
            f"evaluate.scheduler ({self.evaluate.scheduler!r}) goes by the confidence head, and "
            "model.enable_confidence_head is false; set evaluate.scheduler=none",
        )
        self._check_padding()
        self._check_heldout()

    def _check_padding(self) -> None:
        require(
            not self.data.group_by_length or self.loss.normalization == "global_step",
            "data.group_by_length changes which samples share a micro-batch, and with "
            f"loss.normalization {self.loss.normalization!r} that changes the gradient; set "
            "loss.normalization=global_step or data.group_by_length=false",
        )
        require(
            not self.target.packing or self.train.micro_batch_size > 1,
            "target.packing puts the samples of a micro-batch behind one another, and "
            f"train.micro_batch_size ({self.train.micro_batch_size}) has one, without padding; set "
            "train.micro_batch_size > 1 or target.packing=false",
        )

    def _check_heldout(self) -> None:
        trained = {os.path.realpath(path) for path in self.data.train_files}
        both = [path for path in self.evaluate.heldout_files if os.path.realpath(path) in trained]
        require(
            not both,
            f"evaluate.heldout_files must not be trained on, and {', '.join(both)} is in "
            "data.train_files; take some of its lines out into a file of their own",
        )
        require(
            self.evaluate.every is None or self.needs_teacher,
            "evaluate.every compares with the target's distribution, which an objective of cross "
            "entropy alone does not load; set evaluate.every=null, or give a term that compares "
            "(loss.l1_loss_alpha, loss.kl_loss_alpha, ...) a weight",
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares with the target's distribution."""
        return self.loss.needs_teacher(with_confidence_head=self.model.enable_confidence_head)

    @property
    def min_loss_tokens(self) -> int:
        """`data.min_loss_tokens`, or twice the block size (DeepSpec's default)."""
        return self.data.min_loss_tokens or 2 * self.model.block_size


def _positive(name: str, value: float) -> None:
    require(value > 0, f"{name} ({value}) must be > 0")


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} ({value!r}) must be one of {', '.join(valid)}{hint}")
