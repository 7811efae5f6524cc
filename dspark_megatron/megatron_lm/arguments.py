"""Megatron's command line: the group of the draft, and all of it as a config."""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import types
import typing
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from dspark_megatron.bounded_text import parse_yaml
from dspark_megatron.config import Config
from dspark_megatron.config.loading import config_from_dict
from dspark_megatron.config.objective.terms import OLDER_NAMES
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.megatron_lm.names import ARGUMENTS, settings

ARGS_DEFAULTS = {"dataloader_type": "external", "tokenizer_type": "HuggingFaceTokenizer"}
"""For the `args_defaults` of Megatron's parser."""
SECTIONS = ("model", "loss", "data", "target")
"""Those whose keys have arguments of their own, where Megatron has none for them."""

_BY_MEGATRON = ("train.resume", "train.initial_checkpoint", "train.tensorboard")
"""Keys of what `pretrain()` does itself, and so not from our config; and all of `evaluate`."""
_MUST_BE = {
    "calculate_per_token_loss": (True, "the loss of a step is divided by its weight once"),
    "expert_model_parallel_size": (1, "experts spread over ranks were not run in this loop"),
    "pipeline_model_parallel_size": (1, "the target and the draft are one stage"),
    "dataloader_type": ("external", "the order of samples and anchors is the draft's own"),
    "eval_iters": (0, "held-out answers are decoded: see docs/evaluation.md"),
    "rampup_batch_size": (None, "every step has the same number of samples"),
    "step_batch_size_schedule": (None, "every step has the same number of samples"),
    "overlap_param_gather": (False, "the loss reads weights outside of a module's forward pass"),
    "use_torch_fsdp2": (False, "parameters are not sharded; give --use-distributed-optimizer"),
    "use_megatron_fsdp": (False, "parameters are not sharded; give --use-distributed-optimizer"),
    "optimizer": ("adam", "Muon of a draft is this package's own loop's: optimizer.name=muon"),
    "fp8": (None, "a draft trains in bf16 or fp32"),
    "fp4": (None, "a draft trains in bf16 or fp32"),
    "gtp_weight_remat_size": (1, "tensor-parallel slices of the draft are whole on a rank"),
    "init_model_with_meta_device": (False, "the draft is made with its weights"),
    "pretrained_checkpoint": (
        None,
        "Megatron loads it into the draft; give --dspark-target-checkpoint for the target, or "
        "--load with --finetune for a draft to start from",
    ),
    "ckpt_format": ("torch_dist", "a checkpoint holds the draft alone, for any layout"),
}
"""What Megatron's arguments must be, and why; a version may not have all of them."""


def add_dspark_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add an argument for each key of SECTIONS that Megatron has none for: an
    `extra_args_provider`."""
    group = parser.add_argument_group(title="dspark")
    for section, field in _own_fields():
        cls = type(getattr(Config(), section))
        text = f"{_docstrings(cls).get(field.name, '')} Default: {_default(field)}."
        group.add_argument(
            flag(section, field.name),
            default=argparse.SUPPRESS,  # left open, so that a preset of the loss may decide
            help=text.replace("%", "%%").strip(),
            **_parsing(field.type),
        )
    for key, term in OLDER_NAMES.items():
        group.add_argument(
            flag("loss", key),
            default=argparse.SUPPRESS,
            type=float,
            help=f"Older name of {term} in {flag('loss', 'terms')}.",
        )
    return parser


def config_from_args(args: Namespace) -> Config:
    """The checked config of Megatron's parsed arguments. Raises ConfigError for what `pretrain()`
    cannot do with a draft."""
    for name, (value, reason) in _MUST_BE.items():
        found = vars(args).get(name, value)
        require(
            found == value,
            f"--{name.replace('_', '-')} is {found} and must be {value}: {reason}",
        )
    sections = settings(args, (entry for entry in ARGUMENTS if _is_ours(entry.key)))
    for section, field in _own_fields():
        name = flag(section, field.name).removeprefix("--").replace("-", "_")
        if hasattr(args, name):
            sections.setdefault(section, {})[field.name] = getattr(args, name)
    for key in OLDER_NAMES:
        name = flag("loss", key).removeprefix("--").replace("-", "_")
        if hasattr(args, name):
            sections.setdefault("loss", {})[key] = getattr(args, name)
    sections["train"].setdefault("output_dir", "not saved")
    if args.train_iters is None:
        sections["train"]["iterations"] = (args.train_samples or 0) // args.global_batch_size
    config = config_from_dict(sections)
    config.validate()
    require(
        config.loss.normalization in ("global_step", "global_samples"),
        f"{flag('loss', 'normalization')} is {config.loss.normalization!r} and must be "
        "'global_step' or 'global_samples': Megatron divides the whole step once",
    )
    require(
        not config.optimizer.overlap_grad_reduce or config.loss.anchor_rule == "label",
        "--overlap-grad-reduce needs something to learn in every micro-batch, which "
        f"{flag('loss', 'anchor_rule')} {config.loss.anchor_rule!r} does not give; leave it out",
    )
    return config


def flag(section: str, key: str) -> str:
    """The argument of a key: `--dspark-`, the section unless it is `model` or the key begins with
    it, and the key."""
    plain = section == "model" or key.startswith(f"{section}_")
    return f"--dspark-{key if plain else f'{section}_{key}'}".replace("_", "-")


def _is_ours(key: str) -> bool:
    return key not in _BY_MEGATRON and not key.startswith("evaluate.")


def _own_fields() -> list[tuple[str, dataclasses.Field]]:
    named = {entry.key for entry in ARGUMENTS}
    config = Config()
    return [
        (section, field)
        for section in SECTIONS
        for field in dataclasses.fields(getattr(config, section))
        if f"{section}.{field.name}" not in named
    ]


def _parsing(kind: Any) -> dict[str, Any]:
    """A field's type as argparse has it; `null` is none where the field may be none."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is list:
        return {"nargs": "+", "type": typing.get_args(kind)[0]}
    if dataclasses.is_dataclass(kind):
        return {"type": _mapping}
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        return {"type": _or_null(_mapping if typing.get_origin(kind) is dict else kind)}
    return {"type": kind if isinstance(kind, type) else str}  # a Literal is checked by the config


def _mapping(text: str) -> dict[str, Any]:
    """YAML's, as in an override."""
    found = None
    with contextlib.suppress(ConfigError):
        found = parse_yaml(text, repr(text))
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a mapping, such as '{{key: value}}'")
    return found


def _or_null(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "null" else kind(text)

    parse.__name__ = f"{kind.__name__} or null"  # argparse names it in its error
    return parse


def _default(field: dataclasses.Field) -> str:
    factory: Any = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    return "null" if value is None else str(value)


def _docstrings(cls: type) -> dict[str, str]:
    """The text below each field of a class."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for pair in pairwise(definition.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = " ".join(text.split())
    return found
