"""Where the states of a run come from: the target, checked on its first samples, or a cache."""

from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.targets.base import StatesSource
from dspark_megatron.targets.packing_check import check_packing
from dspark_megatron.targets.teacher_check import check_teacher_logits
from dspark_megatron.training.runtime import Runtime
from dspark_megatron.training.setup import RunPlan, build_target
from dspark_megatron.training.target_cache import cached_target


def states_source(
    plan: RunPlan, runtime: Runtime, dataset: ConversationDataset, draft: DSparkDraftModel
) -> StatesSource:
    """Collective over the world. Raises ConfigError for a target that is not what it seems."""
    config = plan.config
    if config.target.is_cached:
        return cached_target(plan, runtime, dataset)
    target = build_target(plan, runtime, with_last_hidden=config.needs_teacher)
    if config.target.check_teacher_logits and config.needs_teacher:
        first = dataset[0].input_ids[None]
        place = draft.lm_head, draft.vocab_shard
        check_teacher_logits(target, config.target.path, *place, first)
    if config.target.packing:
        few = (dataset[i % len(dataset)] for i in range(3))
        check_packing(target, [sample.input_ids for sample in few])
    return target
