"""A GPTModel from a Megatron-LM checkpoint: its shape, and its weights in this run's layout."""

import argparse
import inspect
import re
from importlib.metadata import version
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from dspark_megatron.errors import require
from dspark_megatron.storage.checkpoints.damage import Damage
from dspark_megatron.storage.checkpoints.data_only import known_classes
from dspark_megatron.storage.gpt_checkpoint import GPTCheckpoint
from dspark_megatron.storage.torch_dist_folder import cause_of
from dspark_megatron.targets.megatron.gpt_shape import GPTShape

_ONLY = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "multi_latent_attention": False,
    "qk_l2_norm": False,
    "apply_layernorm_1p": False,
    "no_rope_freq": None,
    "use_mup": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "experimental_attention_variant": None,
    "window_size": None,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_apply_probs_on_input": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_expert_capacity_factor": None,
    "moe_latent_size": None,
}
"""What all models of ours have in common; an argument that a version lacks is as here."""
_ROUTING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")
"""Ways of balancing experts that do not change which are chosen, nor their weights."""
_NEEDED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("group_query_attention", "qk_layernorm", "norm_epsilon", "rotary_base"),
    "untie_embeddings_and_output_weights",
)
_NEEDED_FOR_EXPERTS = (
    *("moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk", "moe_router_pre_softmax"),
)
_RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
"""What Megatron-LM 0.19 calls the arguments of older versions."""
_DETAILS = "_extra_state"
"""What layers save of themselves beside their weights."""
_PASSED_OVER = ("mtp.", "rotary_pos_emb.")
"""Layers for multi-token prediction, which the decoder does without, and what is computed."""
_OTHER_NAMES = (
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
)
"""Norms apart from the next linear or in it: the local and Transformer Engine's layers differ, and
for experts Megatron's own names do not agree."""


def shape_of_checkpoint(checkpoint: GPTCheckpoint, vocab_size: int) -> GPTShape:
    """The shape that the checkpoint's arguments give. vocab_size: entries that count, which they do
    not say. Raises ConfigError for a model that is not of this kind."""
    args = with_old_names(checkpoint.args)
    experts = getattr(args, "num_experts", None)
    needed = _NEEDED if experts is None else (*_NEEDED, *_NEEDED_FOR_EXPERTS)
    lacking = [name for name in needed if not hasattr(args, name)]
    require(
        not lacking,
        f"the arguments in target.checkpoint {checkpoint.path} must say {', '.join(lacking)}; save "
        "it with a newer Megatron-LM",
    )
    wrong = [
        f"{name} ({getattr(args, name)}, must be {value})"
        for name, value in _ONLY.items()
        if getattr(args, name, value) != value
    ]
    balancing = getattr(args, "moe_router_load_balancing_type", "none")
    kinds = balancing if isinstance(balancing, list) else [balancing]
    if experts is not None and not set(kinds) <= set(_ROUTING):
        wrong.append(f"moe_router_load_balancing_type ({balancing}, must be of {_ROUTING})")
    require(
        not wrong,
        f"target.checkpoint {checkpoint.path} is of a model that is not supported: "
        f"{', '.join(wrong)}; build its GPTModel yourself and give it to MegatronTarget",
    )
    rows, _ = checkpoint.shapes["embedding.word_embeddings.weight"]
    require(
        rows >= vocab_size,
        f"the embedding of target.checkpoint {checkpoint.path} has {rows} rows, fewer than the "
        f"vocab_size of config.json ({vocab_size}); set that to the number of entries that the "
        "model was trained with",
    )
    heads = args.num_attention_heads
    scaled = getattr(args, "use_rope_scaling", False)
    return GPTShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else heads,
        kv_channels=args.kv_channels,
        vocab_size=vocab_size,
        qk_layernorm=args.qk_layernorm,
        add_qkv_bias=getattr(args, "add_qkv_bias", False),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        layernorm_epsilon=args.norm_epsilon,
        rotary_base=float(args.rotary_base),
        rope_scaling_factor=float(args.rope_scaling_factor) if scaled else None,
        **({} if experts is None else _experts(args)),
    )


def with_old_names(args: argparse.Namespace) -> argparse.Namespace:
    """A copy in which renamed arguments have their older names, too."""
    both = vars(args).copy()
    for old, new in _RENAMED.items():
        if new in both:
            both[old] = both[new]
    return argparse.Namespace(**both)


def arguments_read(args: argparse.Namespace) -> list[str]:
    """Those that a version may call otherwise: read here, and not in `args`."""
    known = with_old_names(args)
    return [n for n in (*_ONLY, *_NEEDED, *_NEEDED_FOR_EXPERTS) if not hasattr(known, n)]


def _experts(args: argparse.Namespace) -> dict[str, Any]:
    pattern = args.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(i % pattern == 0) for i in range(args.num_layers)]
    return {
        "num_experts": args.num_experts,
        "moe_ffn_hidden_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "moe_router_topk": args.moe_router_topk,
        "moe_router_pre_softmax": args.moe_router_pre_softmax,
        "moe_layer_freq": None if all(pattern) else tuple(pattern),
    }


def load_checkpoint_weights(model: GPTModel, checkpoint: GPTCheckpoint) -> None:
    """Fill this rank's part of the model, whatever layout wrote the checkpoint. Collective over the
    world. Raises ConfigError, before anything is read, where the two have not the same tensors."""
    state = {
        name: entry
        for name, entry in _sharded_state(model, checkpoint).items()
        if not name.endswith(_DETAILS)
    }
    _check_tensors(state, checkpoint, pp_group=model.pg_collection.pp)
    _ = checkpoint.args  # seen to be harmless: Megatron-Core unpickles them again
    has_old_form = (checkpoint.path / "common.pt").is_file()
    needs_old_form = "common_strategy" in inspect.signature(dist_checkpointing.load).parameters
    require(
        has_old_form or not needs_old_form,
        f"target.checkpoint {checkpoint.path} has no common.pt: a newer Megatron-Core wrote it, "
        f"and {version('megatron-core')} cannot read it; install that version",
    )
    try:
        with known_classes():
            loaded = dist_checkpointing.load({"model": state}, str(checkpoint.path))["model"]
    except CheckpointException as error:
        raise Damage.of(checkpoint.path, cause_of(error)) from error
    cut = len(checkpoint.prefix)
    result = model.load_state_dict({n[cut:]: t for n, t in loaded.items()}, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith(_DETAILS)]
    assert not missing and not result.unexpected_keys, result


def _sharded_state(model: GPTModel, checkpoint: GPTCheckpoint) -> dict[str, Any]:
    """This rank's tensors, by Megatron-Core's plan, under the names that the checkpoint has."""
    there = checkpoint.shapes
    metadata = {
        "dp_cp_group": model.pg_collection.dp_cp,
        "non_homogeneous_layers": any(re.match(r"decoder\.layers\.\d", name) for name in there),
        "singleton_local_shards": any(name.endswith("linear_fc1.weight_w") for name in there),
    }
    state = model.sharded_state_dict(prefix=checkpoint.prefix, metadata=metadata)
    for entry in state.values():
        for pair in _OTHER_NAMES:
            for one, other in (pair, pair[::-1]):
                name = entry.key.replace(one, other)
                if entry.key not in checkpoint.folder.shapes and name in checkpoint.folder.shapes:
                    entry.key = name
    return state


def _check_tensors(
    state: dict[str, Any], checkpoint: GPTCheckpoint, *, pp_group: dist.ProcessGroup
) -> None:
    """One all-gather of an object over the stages, each of which knows its own tensors only."""
    wanted: dict[str, ShardedTensor] = {}
    for entry in state.values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        wanted |= {part.key: part for part in nested_values(parts)}
    found = checkpoint.folder.shapes
    problems = [f"lacks {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [
        f"has {name} as {found[name]} instead of {part.global_shape}"
        for name, part in wanted.items()
        if name in found and found[name] != part.global_shape and not part.allow_shape_mismatch
    ]
    of_stages: list[Any] = [None] * pp_group.size()
    dist.all_gather_object(of_stages, {_any_expert(name) for name in wanted}, group=pp_group)
    known = set().union(*of_stages)
    problems += [
        f"has an unknown {name}"
        for name in sorted(checkpoint.shapes)
        if not name.startswith(_PASSED_OVER) and _any_expert(checkpoint.prefix + name) not in known
    ]
    shown = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
    require(
        not problems,
        f"target.checkpoint {checkpoint.path} does not hold the model of its arguments: it {shown}",
    )


def _any_expert(name: str) -> str:
    """The name without the number of an expert, which another rank may hold."""
    return re.sub(r"experts\.\d+\.", "experts.", name)
