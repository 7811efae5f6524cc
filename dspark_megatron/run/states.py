"""Where a run's states come from: the target, checked on its first samples, or stored states,
checked against the run.
"""

import hashlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.errors import ConfigError, printable
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.ops.logit_transform import TargetHead
from dspark_megatron.run.build import build_target, read_target_head
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.identity import clock_hint, template_day
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.storage.checksums import CHECKSUMS
from dspark_megatron.storage.notices import say_once
from dspark_megatron.targets.base import Target
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget
from dspark_megatron.targets.shared_pass import SharedPasses
from dspark_megatron.targets.start_checks import check_packing, check_target_logits
from dspark_megatron.targets.stored import deepspec_layout, safetensors_layout
from dspark_megatron.targets.stored.layout import StatesReader, differences, read_manifest
from dspark_megatron.targets.stored.target import StoredStates
from dspark_megatron.targets.stored.verification import (
    ShardChecks,
    check_files,
    known_checksums,
)


def states_source(
    plan: RunPlan, runtime: Runtime, dataset: ConversationDataset, draft: DSparkDraftModel
) -> Target | StoredStates:
    """Collective over the world. Raises ConfigError for a target that is not what it seems."""
    if plan.config.target.is_stored:
        return stored_states_of(plan, runtime, dataset)
    target = checked_target(plan, runtime, dataset, draft)
    if plan.config.target.packing:
        assert isinstance(target, HuggingFaceTarget), "no other packs"
        few = (dataset[i % len(dataset)] for i in range(3))
        check_packing(target, [sample.input_ids for sample in few])
    together = plan.pass_size.micro_batches
    if together == 1:
        return target
    return SharedPasses(target, together, packs=plan.config.target.packing)


def checked_target(
    plan: RunPlan,
    runtime: Runtime,
    dataset: ConversationDataset,
    draft: DSparkDraftModel | None = None,
) -> Target:
    """The target, whose logits were compared on the first sample; ConfigError where they differ.
    Collective over the world. Without a draft the target's LM head is read for it."""
    config = plan.config
    target = build_target(plan, runtime, with_last_hidden=config.needs_target_logits)
    if config.target.check_logits and config.needs_target_logits:
        if draft is not None:
            head, shard = TargetHead(draft.lm_head, plan.target_transform), draft.vocab_shard
        else:
            head, shard = read_target_head(plan, target, tp_group=runtime.tp_group)
        first = dataset[0].input_ids[None]
        check_target_logits(target, config.target.path, head, shard, first)
    return target


def states_facts(plan: RunPlan) -> dict[str, Any]:
    """What the states are of."""
    return {
        "target_fingerprint": plan.target_fingerprint,
        "target_dtype": str(plan.target_dtype),
        "target_layer_ids": list(plan.shape.target_layer_ids),
        "hidden_size": plan.shape.hidden_size,
    }


def kept_facts(plan: RunPlan) -> dict[str, Any]:
    """What decides which of them our own layout keeps."""
    loss = plan.config.loss
    return {
        "last_hidden": "after the final norm" if plan.config.needs_target_logits else "none",
        "block_size": plan.shape.num_draft_tokens,  # as older states call it
        "rules": {
            "anchor_rule": loss.anchor_rule,
            "supervised_slots": loss.supervised_slots,
            "slot_mask": loss.slot_mask,
        },
    }


def sample_facts(plan: RunPlan) -> dict[str, Any]:
    """What decides on the tokens of a sample."""
    day = template_day(plan)
    return {
        **({"template_date": day} if day else {}),
        "max_length": plan.config.data.max_length,
        "min_loss_tokens": plan.config.min_loss_tokens,
        "tokenizer": _digest(tokenizer_text(plan.tokenizer)),
        "chat_template": _digest(str(plan.tokenizer.chat_template)),
    }


def open_stored_states(plan: RunPlan) -> StatesReader:
    """The finished folder `target.cache`. ConfigError when the run cannot use it, samples aside."""
    folder = Path(plan.config.target.cache)
    manifest = read_manifest(folder)
    check_files(folder)
    reader = reader_of_states(folder, manifest)
    wrong = _wrong(plan, reader.facts)
    if wrong:
        raise ConfigError(
            f"the stored states {folder} are not of this run: {'; '.join(wrong)}. Change the "
            "config, or store the states of this run with `dspark cache`"
        )
    return reader


def stored_states_of(plan: RunPlan, runtime: Runtime, data: ConversationDataset) -> StoredStates:
    """The stored states of a run's data."""
    reader = open_stored_states(plan)
    if runtime.is_main and "target_fingerprint" not in reader.facts:
        print(
            printable(f"{reader.path} does not say of which weights it is: not checked"), flush=True
        )
    # With `full` they were made before.
    later = plan.config.storage.verify == "size"
    checks = _shard_checks(reader, runtime) if later else None
    there, here = reader.facts.get("data", {}), sample_facts(plan)
    hints = differences(there, here) if there else []
    if hint := clock_hint(there, here):
        hints = [*hints, hint.strip(" .")]
    return StoredStates(reader, data, device=runtime.device, hints=hints, checks=checks)


def reader_of_states(folder: Path, manifest: dict[str, Any]) -> StatesReader:
    """Of either layout; ConfigError for another."""
    if manifest.get("format") == safetensors_layout.FORMAT:
        return safetensors_layout.SafetensorsStates(folder, manifest)
    if manifest.get("version") == deepspec_layout.VERSION:
        return deepspec_layout.DeepSpecStates(folder, manifest)
    raise ConfigError(
        f"{folder} must hold stored states in the form {safetensors_layout.FORMAT!r} or "
        f"DeepSpec's version {deepspec_layout.VERSION}; write them with "
        "`dspark cache`"
    )


def check_stored_states(plan: RunPlan, runtime: Runtime) -> None:
    """Before the data are read: ConfigError where the run cannot use `target.cache`, and with
    `storage.verify: full` for a shard that is damaged. Each rank reads its share."""
    reader = open_stored_states(plan)
    if plan.config.storage.verify == "full":
        _shard_checks(reader, runtime).check()


def _shard_checks(reader: StatesReader, runtime: Runtime) -> ShardChecks:
    known = known_checksums(reader.path)
    if not known:
        say_once(
            f"{reader.path} has no {CHECKSUMS} (an older version or another program wrote it): "
            "what its files hold is checked for values that are not finite or all zero, no more"
        )
    return ShardChecks(reader, known, rank=runtime.rank, ranks=runtime.world_size)


def _wrong(plan: RunPlan, there: dict[str, Any]) -> list[str]:
    """How what a folder says of itself does not suit; what it does not say is not compared."""
    here = {**states_facts(plan), **kept_facts(plan)}
    if not plan.config.needs_target_logits:
        del here["last_hidden"]
    if there.get("block_size", 0) >= here["block_size"]:
        del here["block_size"]  # shorter blocks need fewer states
    return differences(there, {name: here[name] for name in here if name in there})


def tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides which tokens a text has."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return str(sorted(tokenizer.get_vocab().items()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
