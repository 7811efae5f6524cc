"""A cache of target states against a run: what must be equal, and what explains a difference."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dspark_megatron.config import ConfigError
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.ops.anchors import BlockRules
from dspark_megatron.targets import deepspec_cache, row_cache
from dspark_megatron.targets.cache_files import CacheReader, differences, read_manifest
from dspark_megatron.targets.cached_target import CachedTarget
from dspark_megatron.training.runtime import Runtime
from dspark_megatron.training.setup import RunPlan
from dspark_megatron.training.template_day import clock_hint, template_day


def target_facts(plan: RunPlan) -> dict[str, Any]:
    """What states are of."""
    return {
        "target_fingerprint": plan.target_fingerprint,
        "target_dtype": str(plan.target_dtype),
        "target_layer_ids": list(plan.shape.target_layer_ids),
        "hidden_size": plan.shape.hidden_size,
    }


def row_facts(plan: RunPlan) -> dict[str, Any]:
    """What decides which of them our own layout keeps."""
    return {
        "last_hidden": "after the final norm" if plan.config.needs_teacher else "none",
        "block_size": plan.shape.block_size,
        "rules": asdict(BlockRules.of(plan.config.loss)),
    }


def data_facts(plan: RunPlan) -> dict[str, Any]:
    """What decides on the tokens of a sample."""
    day = template_day(plan)
    return {
        **({"template_date": day} if day else {}),
        "max_length": plan.config.data.max_length,
        "min_loss_tokens": plan.config.min_loss_tokens,
        "tokenizer": _digest(tokenizer_text(plan.tokenizer)),
        "chat_template": _digest(str(plan.tokenizer.chat_template)),
    }


def open_cache(plan: RunPlan) -> CacheReader:
    """The finished cache `target.cache`. ConfigError when the run cannot use it, samples aside."""
    folder = Path(plan.config.target.cache)
    manifest = read_manifest(folder)
    if manifest.get("format") == row_cache.FORMAT:
        cache: CacheReader = row_cache.RowCache(folder, manifest)
    elif manifest.get("version") == deepspec_cache.VERSION:
        cache = deepspec_cache.DeepSpecCache(folder, manifest)
    else:
        raise ConfigError(
            f"{folder} must be a cache in the form {row_cache.FORMAT!r} or DeepSpec's version "
            f"{deepspec_cache.VERSION}; write one with tools/prepare_target_cache.py"
        )
    wrong = _wrong(plan, cache.facts)
    if wrong:
        raise ConfigError(
            f"the cache {folder} is not of this run: {'; '.join(wrong)}. Change the config, or "
            "write a cache for it with tools/prepare_target_cache.py"
        )
    return cache


def cached_target(plan: RunPlan, runtime: Runtime, data: ConversationDataset) -> CachedTarget:
    """The states of a run's data, from its cache."""
    cache = open_cache(plan)
    if runtime.is_main and "target_fingerprint" not in cache.facts:
        print(f"{cache.path} does not say of which weights it is: not checked", flush=True)
    there, here = cache.facts.get("data", {}), data_facts(plan)
    hints = differences(there, here) if there else []
    if hint := clock_hint(there, here):
        hints = [*hints, hint.strip(" .")]
    return CachedTarget(cache, data, device=runtime.device, hints=hints)


def _wrong(plan: RunPlan, there: dict[str, Any]) -> list[str]:
    """How what a cache says of itself does not suit; what it does not say is not compared."""
    here = {**target_facts(plan), **row_facts(plan)}
    if not plan.config.needs_teacher:
        del here["last_hidden"]
    if there.get("block_size", 0) >= here["block_size"]:
        del here["block_size"]  # a smaller one needs fewer states
    return differences(there, {name: here[name] for name in here if name in there})


def tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides which tokens a text has."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return str(sorted(tokenizer.get_vocab().items()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
