"""The samples of a run: files read by the rules of its config."""

from dataclasses import replace

from dspark_megatron.config import Config
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.reasoning import Tags
from dspark_megatron.data.conversation import describe_sample
from dspark_megatron.data.dataset import ConversationDataset, SampleRules, load_samples
from dspark_megatron.errors import printable
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.indexed_dataset import read_indexed
from dspark_megatron.run.ranks.agreement import agree
from dspark_megatron.run.ranks.facts import data_facts
from dspark_megatron.run.ranks.places import at
from dspark_megatron.run.ranks.runtime import Runtime
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
        block_size=config.model.block_size,
        loss=config.loss,
    )


def load_run_data(
    plan: RunPlan,
    entries: list[str],
    *,
    weights: list[float] | None = None,
    show_progress: bool = False,
) -> ConversationDataset:
    """The samples of these entries of data.train_files or evaluate.heldout_files."""
    rules = sample_rules(plan.config)
    stop_ids = frozenset(stop_token_ids(plan.config.target.path, plan.tokenizer))
    rules = replace(rules, answers=replace(rules.answers, stop_ids=stop_ids))
    return load_samples(
        entries,
        plan.tokenizer,
        plan.shape.vocab_size,
        rules,
        weights=weights,
        read_indexed=read_indexed,
        show_progress=show_progress,
    )


def load_train_data(plan: RunPlan, runtime: Runtime) -> ConversationDataset:
    """The training samples, the same on all ranks; the main rank says what became of the files'
    lines."""
    data = plan.config.data
    at("reading data.train_files", longer=True)
    dataset = load_run_data(
        plan, data.train_files, weights=data.weights, show_progress=runtime.is_main
    )
    agree(data_facts("data.train_files", data.train_files, dataset))
    if runtime.is_main:
        print(printable(dataset.report.describe()), flush=True)
        if data.show_sample:
            print(printable(describe_sample(dataset[0], plan.tokenizer)), flush=True)
    return dataset
