"""The samples of a run: files read by the rules of its config."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from dspark_megatron.config import Config
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.reasoning import Tags
from dspark_megatron.data.conversation import describe_sample
from dspark_megatron.data.dataset import ConversationDataset, load_in_memory
from dspark_megatron.data.rules import SampleRules
from dspark_megatron.data.token_store import Facts
from dspark_megatron.data.tokenizing.collecting import Tokenizing
from dspark_megatron.data.tokenizing.encoding import LineEncoder
from dspark_megatron.errors import printable
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.indexed_dataset import read_indexed
from dspark_megatron.run.ranks.agreement import agree
from dspark_megatron.run.ranks.facts import file_facts, sample_facts
from dspark_megatron.run.ranks.places import at
from dspark_megatron.run.ranks.runtime import Runtime, from_main_rank
from dspark_megatron.run.token_cache import (
    TokenCache,
    cache_folder,
    dataset_in,
    load_alone,
    load_together,
)
from dspark_megatron.run.token_facts import token_facts
from dspark_megatron.storage.target_folder import stop_token_ids


def sample_rules(config: Config) -> SampleRules:
    """What training makes of a sample, the target's stop tokens aside."""
    data = config.data
    opening, closing = data.reasoning_tags
    tags = Tags(opening.strip(), closing.strip())
    return SampleRules(
        max_length=data.max_length,
        min_loss_tokens=config.min_loss_tokens,
        mask_token_id=config.model.mask_token_id,
        skip_bad_lines=data.skip_bad_lines,
        reasoning_tags=(opening, closing) if data.reasoning == "mask" else None,
        answers=AnswerRules(tags=tags, template_date=data.template_date),
        num_draft_tokens=config.model.num_draft_tokens,
        loss=config.loss,
    )


def load_run_data(
    plan: RunPlan,
    entries: list[str],
    *,
    name: str = "data.train_files",
    weights: list[float] | None = None,
    runtime: Runtime | None = None,
    show_progress: bool = False,
) -> ConversationDataset:
    """The samples of these entries of `name`, data.train_files or evaluate.heldout_files, the same
    on all ranks; every rank calls it. runtime: None: this process alone needs them, and makes a
    folder of them only where data.cache_dir names one."""
    rules = sample_rules(plan.config)
    stop_ids = frozenset(stop_token_ids(plan.config.target.path, plan.tokenizer))
    rules = replace(rules, answers=replace(rules.answers, stop_ids=stop_ids))
    work = partial(
        Tokenizing,
        entries,
        LineEncoder(plan.tokenizer, plan.shape.vocab_size, rules),
        read_indexed=read_indexed,
        workers=plan.config.data.tokenize_workers,
        show_progress=show_progress,
    )
    if runtime is not None:
        at(f"reading {name}", longer=True)
        agree(file_facts(name, entries))
    cache = _cache(plan, partial(token_facts, plan, entries, rules), work, runtime)
    if runtime is not None:
        store = load_together(cache, runtime, f"reading {name}") if cache else None
    else:
        store = load_alone(cache, makes=plan.config.data.cache_dir is not None) if cache else None
    if store is not None:
        dataset = dataset_in(store, entries, rules, weights)
    else:
        if runtime is not None and runtime.world_size > 1:
            work = partial(work, workers=0)  # every rank tokenizes
        dataset = load_in_memory(work(), entries, rules, weights)
    if runtime is not None:
        agree(sample_facts(name, dataset))
    return dataset


def _cache(
    plan: RunPlan,
    facts_of: Callable[[], Facts],
    work: Callable[[], Tokenizing],
    runtime: Runtime | None,
) -> TokenCache | None:
    """Where the samples are kept; None where a run has no folder. With a runtime the main rank's
    files count: one broadcast of an object."""
    folder = cache_folder(plan.config)
    if folder is None:
        return None
    facts = facts_of() if runtime is None or runtime.is_main else {}
    facts = from_main_rank(facts) if runtime is not None else facts
    is_full = plan.config.storage.verify == "full"
    return TokenCache(folder.absolute(), facts, work, is_full)


def load_train_data(plan: RunPlan, runtime: Runtime) -> ConversationDataset:
    """The training samples, the same on all ranks; the main rank says what became of the files'
    lines."""
    data = plan.config.data
    dataset = load_run_data(
        plan,
        data.train_files,
        weights=data.weights,
        runtime=runtime,
        show_progress=runtime.is_main,
    )
    if runtime.is_main:
        print(printable(dataset.report.describe()), flush=True)
        if data.show_sample:
            print(printable(describe_sample(dataset[0], plan.tokenizer)), flush=True)
    return dataset
