"""Writes a tiny target as a Megatron-LM checkpoint."""

from argparse import Namespace
from pathlib import Path


class Foreign:
    def __reduce__(self):
        return print, ("foreign code ran",)


def arguments_of(shape, **other):
    """What Megatron-LM's command line calls the parts of a GPTShape."""
    from megatron.core.transformer.enums import AttnBackend

    arguments = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        group_query_attention=True,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        qk_layernorm=shape.qk_layernorm,
        add_qkv_bias=shape.add_qkv_bias,
        add_bias_linear=False,
        swiglu=True,
        normalization="RMSNorm",
        norm_epsilon=shape.layernorm_epsilon,
        position_embedding_type="rope",
        rotary_base=int(shape.rotary_base),
        rotary_percent=1.0,
        use_rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 8.0,
        untie_embeddings_and_output_weights=not shape.share_embeddings_and_output_weights,
        num_experts=shape.num_experts,
        moe_ffn_hidden_size=shape.moe_ffn_hidden_size,
        moe_router_topk=shape.moe_router_topk or 2,
        moe_router_pre_softmax=shape.moe_router_pre_softmax,
        moe_layer_freq=list(shape.moe_layer_freq) if shape.moe_layer_freq else 1,
        attention_backend=AttnBackend.auto,
        data_path=None,
    )
    return Namespace(**{**arguments, **other})


def write_checkpoint(
    runtime,
    config,
    output,
    pp=1,
    name="iter_0000100",
    rename=None,
    arguments=(),
    without="",
    foreign=False,
):
    """Write the target of a config with Hugging Face weights. rename: text in the names of tensors
    and what it becomes. arguments: others for the command line; None: save none. foreign: save an
    object that runs code when it is unpickled. without: an argument to leave out."""
    from megatron.core import dist_checkpointing

    from dspark_megatron.mcore.checkpoint_writer import write_in_this_process
    from dspark_megatron.run.check import check
    from dspark_megatron.targets.megatron.groups import target_groups
    from dspark_megatron.targets.megatron.source import GPTSource

    plan = check(config, runtime.world_size // pp)
    source = GPTSource.open(config.target, plan.target_config)
    groups = target_groups(
        tp_group=runtime.tp_group, pp_size=pp, ep_size=config.parallel.expert_parallel
    )
    stage = groups.pp.rank()
    model = source.model(
        groups, device=runtime.device, pre_process=stage == 0, post_process=stage == pp - 1
    )
    state = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    for tensor in state.values():
        for old, new in (rename or {}).items():
            tensor.key = tensor.key.replace(old, new)
    folder = Path(output) / name
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": state, "iteration": 100, "checkpoint_version": 3.0}
    if arguments is not None:
        content["args"] = arguments_of(source.shape, **dict(arguments))
        content["args"].__dict__.pop(without, None)
    if foreign:
        content["rng"] = Foreign()
    write_in_this_process()
    dist_checkpointing.save(content, str(folder))
    iteration = name.removeprefix("iter_").lstrip("0")
    (Path(output) / "latest_checkpointed_iteration.txt").write_text(iteration)
    return source.shape
