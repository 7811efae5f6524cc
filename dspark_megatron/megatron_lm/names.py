"""The names that Megatron's users know: each command-line argument of theirs and our key for it.

`table()` is the one in docs/megatron_arguments.md.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dspark_megatron.config import Config
from dspark_megatron.errors import require


@dataclass(frozen=True)
class Argument:
    name: str
    """As on Megatron's command line."""
    key: str
    """`section.key` of Config."""
    default: Any = None
    """Megatron's; None: there is none."""
    difference: str = ""
    """What is not the same here, beside the default."""
    convert: Callable[[Namespace], Any] | None = None
    """Megatron's parsed arguments to our value; None: it is the argument's own."""

    def value(self, arguments: Namespace) -> Any:
        """None where Megatron's user has left it open. Raises ConfigError for what has no
        counterpart."""
        if self.convert is not None:
            return self.convert(arguments)
        return getattr(arguments, self.name.removeprefix("--").replace("-", "_"))


def _whole_experts(arguments: Namespace) -> int:
    experts = arguments.expert_model_parallel_size
    each = arguments.expert_tensor_parallel_size or arguments.tensor_model_parallel_size
    require(
        experts == 1 or each == 1,
        f"--expert-model-parallel-size ({experts}) spreads whole experts here; give "
        f"--expert-tensor-parallel-size 1 with it, not {each}",
    )
    return experts


def _dtype(arguments: Namespace) -> str:
    require(not arguments.fp16, "--fp16: a draft trains in bf16 or fp32; give --bf16 or neither")
    return "bfloat16" if arguments.bf16 else "float32"


def _continues(arguments: Namespace) -> bool:
    """Whether --load is the run itself; with --finetune it is weights to start from."""
    if arguments.load is None or arguments.finetune:
        return False
    require(
        arguments.load == arguments.save,
        f"--load {arguments.load} must be --save ({arguments.save}): a run continues in its own "
        "folder; give --finetune to start a new one from the weights of another",
    )
    return True


def _recompute(arguments: Namespace) -> bool:
    granularity = arguments.recompute_granularity
    require(
        granularity != "selective",
        "--recompute-granularity selective: draft layers are recomputed whole; give full",
    )
    return granularity == "full"


def _warmup_ratio(arguments: Namespace) -> float | None:
    if arguments.lr_warmup_fraction is not None or not arguments.lr_warmup_iters:
        return arguments.lr_warmup_fraction
    require(bool(arguments.train_iters), "--lr-warmup-iters is a share of --train-iters; give both")
    return arguments.lr_warmup_iters / arguments.train_iters


def _min_lr_ratio(arguments: Namespace) -> float | None:
    return None if arguments.lr is None else arguments.min_lr / arguments.lr


def _heldout_samples(arguments: Namespace) -> int | None:
    if arguments.eval_interval is None or arguments.global_batch_size is None:
        return None
    return arguments.eval_iters * arguments.global_batch_size


def _blend(arguments: Namespace) -> tuple[list[str] | None, list[float] | None]:
    """Prefixes and weights of --data-path: `[weight prefix]...`, or prefixes alone."""
    path = arguments.data_path
    try:
        weights = [float(weight) for weight in path[::2]] if path and len(path) % 2 == 0 else []
    except ValueError:
        weights = []
    return (path[1::2], weights) if weights else (path, None)


ARGUMENTS = (
    Argument("--tensor-model-parallel-size", "parallel.tensor_parallel", 1),
    Argument(
        "--pipeline-model-parallel-size",
        "parallel.pipeline_parallel",
        1,
        "of the target; each stage trains a replica of the draft",
    ),
    Argument("--context-parallel-size", "parallel.context_parallel", 1, "only 1"),
    Argument(
        "--expert-model-parallel-size",
        "parallel.expert_parallel",
        1,
        "whole experts, as with `--expert-tensor-parallel-size 1`",
        _whole_experts,
    ),
    Argument("--sequence-parallel", "parallel.sequence_parallel", False, "of the draft"),
    Argument(
        "--tokenizer-model",
        "target.path",
        difference="a folder in Hugging Face's layout that has the target's config, too",
    ),
    Argument(
        "--transformer-impl",
        "model.backend",
        "transformer_engine",
        "of the draft; also `auto`, no `inference_optimized`",
    ),
    Argument("--spec", "model.layer_spec", difference="of the draft's layer"),
    Argument("--init-method-std", "model.initializer_range", 0.02, "of the draft"),
    Argument(
        "--data-path",
        "data.train_files",
        difference="JSONL and Parquet as well as prefixes of indexed datasets",
        convert=lambda arguments: _blend(arguments)[0],
    ),
    Argument(
        "--data-path",
        "data.weights",
        difference="the weights between Megatron's prefixes, in a list of their own",
        convert=lambda arguments: _blend(arguments)[1],
    ),
    Argument(
        "--seq-length",
        "data.max_length",
        difference="the longest; shorter samples are not filled up to it",
    ),
    Argument(
        "--data-cache-path",
        "data.cache_dir",
        difference="of tokenized data; none is `token_cache/` in the run's folder",
    ),
    Argument("--valid-data-path", "evaluate.heldout_files", difference="no weights"),
    Argument("--eval-interval", "evaluate.every"),
    Argument(
        "--eval-iters",
        "evaluate.heldout_samples",
        100,
        "in samples: times `--global-batch-size`",
        _heldout_samples,
    ),
    Argument("--lr", "optimizer.lr"),
    Argument("--min-lr", "optimizer.min_lr_ratio", 0.0, "a share of `--lr`", _min_lr_ratio),
    Argument(
        "--lr-warmup-fraction",
        "optimizer.warmup_ratio",
        difference="a share of the whole run; `--lr-warmup-iters` over `--train-iters` is the same",
        convert=_warmup_ratio,
    ),
    Argument("--adam-beta1", "optimizer.adam_beta1", 0.9),
    Argument("--adam-beta2", "optimizer.adam_beta2", 0.999),
    Argument("--adam-eps", "optimizer.adam_eps", 1e-8),
    Argument("--weight-decay", "optimizer.weight_decay", 0.01),
    Argument("--clip-grad", "optimizer.clip_grad", 1.0),
    Argument("--use-distributed-optimizer", "optimizer.use_distributed_optimizer", False),
    Argument("--overlap-grad-reduce", "optimizer.overlap_grad_reduce", False),
    Argument(
        "--no-gradient-accumulation-fusion",
        "optimizer.gradient_accumulation_fusion",
        True,
        "says what is on, not what is off",
        lambda arguments: arguments.gradient_accumulation_fusion,
    ),
    Argument("--train-iters", "train.iterations"),
    Argument("--micro-batch-size", "train.micro_batch_size"),
    Argument("--global-batch-size", "train.global_batch_size"),
    Argument("--bf16", "train.dtype", False, "`bfloat16` or `float32`; no `--fp16`", _dtype),
    Argument(
        "--recompute-granularity",
        "train.recompute_activations",
        difference="`full` is true; no `selective`",
        convert=_recompute,
    ),
    Argument("--seed", "train.seed", 1234),
    Argument(
        "--save",
        "train.output_dir",
        difference="the run's folder; checkpoints are in its `checkpoints/`",
    ),
    Argument(
        "--load",
        "train.resume",
        difference="true or false: a run continues in its own folder",
        convert=_continues,
    ),
    Argument(
        "--finetune",
        "train.initial_checkpoint",
        False,
        "the folder that Megatron has in `--load`; weights only",
        lambda arguments: arguments.load if arguments.finetune else None,
    ),
    Argument("--save-interval", "train.save_every", difference="the last step is saved anyway"),
    Argument(
        "--async-save",
        "train.async_save",
        False,
        "by a thread of the rank; no worker processes, so no `--use-persistent-ckpt-worker`",
    ),
    Argument("--log-interval", "train.log_every", 100),
    Argument("--exit-duration-in-mins", "train.exit_duration_minutes"),
    Argument(
        "--tensorboard-dir",
        "train.tensorboard",
        difference="true or false: it is `tensorboard/` in the run's folder",
        convert=lambda arguments: arguments.tensorboard_dir is not None,
    ),
)


def settings(
    arguments: Namespace, entries: Iterable[Argument] = ARGUMENTS
) -> dict[str, dict[str, Any]]:
    """Megatron's parsed arguments as sections of keys for `config_from_dict`, without those that
    were left open."""
    sections: dict[str, dict[str, Any]] = {}
    for entry in entries:
        value = entry.value(arguments)
        if value is not None:
            section, key = entry.key.split(".")
            sections.setdefault(section, {})[key] = value
    return sections


def table() -> str:
    """All of it in Markdown, with both sides' defaults."""
    ours, lines = Config().to_dict(), ["| Megatron | default | here | default | differs |"]
    lines.append("|---|---|---|---|---|")
    for entry in ARGUMENTS:
        section, key = entry.key.split(".")
        defaults = _cell(entry.default), _cell(ours[section][key])
        lines.append(
            f"| `{entry.name}` | {defaults[0]} | `{entry.key}` | {defaults[1]} | "
            f"{entry.difference} |"
        )
    return "\n".join(lines) + "\n"


def _cell(default: Any) -> str:
    if default in (None, "", []):
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
