"""From a checked run to its parts: the draft, the frozen target, and the weights they share."""

import contextlib

import torch.distributed as dist
import transformers
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from dspark_megatron.conversion.draft_tensors import check_draft_tensors
from dspark_megatron.conversion.layouts.names import raise_if_any
from dspark_megatron.conversion.target_match import not_finite
from dspark_megatron.errors import require
from dspark_megatron.mcore import transformer_engine
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.model.layer_specs import chosen_layer_spec, user_code
from dspark_megatron.ops.logit_transform import TargetHead
from dspark_megatron.ops.vocab_parallel import VocabShard
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.ranks.places import at
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.shape.layout import padded_vocab_size
from dspark_megatron.storage.target_weights import shared_matrices
from dspark_megatron.targets.base import Target
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget
from dspark_megatron.targets.megatron.groups import target_groups
from dspark_megatron.targets.megatron.pipeline import PipelineTarget
from dspark_megatron.targets.megatron.source import GPTSource
from dspark_megatron.targets.megatron.target import MegatronTarget


def build_draft(plan: RunPlan, runtime: Runtime) -> DSparkDraftModel:
    """The draft with weights from train.seed and the target's embedding and head. ConfigError
    where the user's own layers do not build, or do not have the parameters of a draft."""
    backend, override = plan.config.model.backend, plan.config.model.layer_spec
    if runtime.is_main and backend == "auto":
        used = "transformer_engine" if transformer_engine.is_usable() else "local"
        print(f"model.backend auto: {used}", flush=True)
    with user_code(override) if override else contextlib.nullcontext():
        model = empty_draft(plan, runtime, chosen_layer_spec(plan.config.model))
    if override:
        check_draft_tensors(model, f"the draft of model.layer_spec {override}")
    model.init_weights(seed=plan.config.train.seed, std=plan.config.model.initializer_range)
    model.load_frozen_replicas(*frozen_rows(plan, model.vocab_shard))
    return model


def empty_draft(
    plan: RunPlan, runtime: Runtime, spec: ModuleSpec, *, attention_backend: str | None = None
) -> DSparkDraftModel:
    """The draft of these layers, without values. attention_backend: instead of the config's."""
    config = plan.config
    return DSparkDraftModel(
        plan.shape,
        tp_group=runtime.tp_group,
        params_dtype=plan.dtype,
        device=runtime.device,
        attention_backend=attention_backend or config.model.attention_backend,
        attention_group_size=config.model.attention_group_size,
        recompute_activations=config.train.recompute_activations,
        sequence_parallel=config.parallel.sequence_parallel,
        gradient_accumulation_fusion=config.optimizer.gradient_accumulation_fusion,
        spec=spec,
    )


def load_target_head(plan: RunPlan, draft: DSparkDraftModel, target: Target) -> TargetHead:
    """This rank's rows of the target's LM head in the target's own dtype; the draft's replica when
    that is the same."""
    if draft.lm_head.dtype == target.dtype:
        return TargetHead(draft.lm_head, plan.target_transform)
    return _head_rows(plan, draft.vocab_shard, target)


def read_target_head(
    plan: RunPlan, target: Target | PipelineTarget, *, tp_group: dist.ProcessGroup
) -> tuple[TargetHead, VocabShard]:
    """This rank's rows of the target's LM head in the target's own dtype, and which they are; for
    uses without a draft."""
    vocab_size = plan.shape.vocab_size
    padded = padded_vocab_size(vocab_size, tp_group.size())
    shard = VocabShard.of_group(vocab_size, padded, tp_group)
    return _head_rows(plan, shard, target), shard


def _head_rows(plan: RunPlan, shard: VocabShard, target: Target | PipelineTarget) -> TargetHead:
    _, head = frozen_rows(plan, shard)
    rows = head.to(device=target.device, dtype=target.dtype)
    return TargetHead(rows, plan.target_transform)


def frozen_rows(plan: RunPlan, shard: VocabShard) -> list[Tensor]:
    """This rank's rows of the target's embedding and LM head, as they are saved."""
    target, found = plan.config.target, []
    for matrix in shared_matrices(target.path, target.checkpoint):
        rows = matrix.rows(shard.vocab_start_index, shard.vocab_end_index)
        require(
            rows.is_floating_point() and rows.dtype.itemsize > 1,
            f"{matrix.name} in {target.checkpoint or target.path} is quantized ({rows.dtype}), and "
            "the draft reads it as it is; save the target with its embedding and LM head in "
            "bfloat16 or float32",
        )
        problems = not_finite(matrix.name, rows)
        raise_if_any(problems, str(target.checkpoint or target.path))
        found.append(rows)
    return found


def build_target(
    plan: RunPlan,
    runtime: Runtime,
    *,
    with_last_hidden: bool = True,
    built: HuggingFaceTarget | MegatronTarget | None = None,
) -> HuggingFaceTarget | MegatronTarget | PipelineTarget:
    """The frozen target, this rank's part of it; without its last hidden states, only as much of it
    as the taps need. built: the same target for other taps, whose weights are used again."""
    require(
        not plan.config.target.is_stored,
        "this needs the target itself, not states of some samples; set target.provider=huggingface",
    )
    at("loading the target", longer=True)
    if plan.config.target.provider == "megatron":
        assert not isinstance(built, HuggingFaceTarget), "of the same provider"
        return _build_megatron_target(
            plan, runtime, with_last_hidden=with_last_hidden, model=built and built.model
        )
    if not runtime.is_main:
        transformers.utils.logging.disable_progress_bar()
    return HuggingFaceTarget(
        plan.config.target,
        plan.shape.target_layer_ids,
        split=plan.target_split,
        dp_group=runtime.dp_group,
        device=runtime.device,
        with_last_hidden=with_last_hidden,
        model=built and built.model,
    )


def _build_megatron_target(
    plan: RunPlan, runtime: Runtime, *, with_last_hidden: bool, model: GPTModel | None
) -> MegatronTarget | PipelineTarget:
    target, parallel = plan.config.target, plan.config.parallel
    stages = parallel.pipeline_parallel
    groups = target_groups(
        tp_group=runtime.tp_group, pp_size=stages, ep_size=parallel.expert_parallel
    )
    stage = groups.pp.rank()
    if model is None:
        model = GPTSource.open(target, plan.target_config).model(
            groups,
            device=runtime.device,
            sequence_parallel=parallel.sequence_parallel,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
        )
    kept = dict(with_last_hidden=with_last_hidden, with_output_layer=target.check_logits)
    layer_ids = plan.shape.target_layer_ids
    if stages > 1:
        per_run = parallel.pipeline_micro_batches
        return PipelineTarget(model, layer_ids, micro_batches_per_run=per_run, **kept)
    most = target.max_tokens_per_forward
    return MegatronTarget(model, layer_ids, max_tokens_per_forward=most, **kept)
