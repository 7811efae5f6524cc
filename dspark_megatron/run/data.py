"""The samples of a run: files read by the rules of its config."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from dspark_megatron.config import Config
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.reasoning import Tags
from dspark_megatron.data.conversation import describe_sample
from dspark_megatron.data.dataset import ConversationDataset, SampleRules, load_samples
from dspark_megatron.errors import ConfigError, printable, require
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.ranks.agreement import agree
from dspark_megatron.run.ranks.facts import data_facts
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
    dataset = load_run_data(
        plan, data.train_files, weights=data.weights, show_progress=runtime.is_main
    )
    agree(data_facts("data.train_files", data.train_files, dataset))
    if runtime.is_main:
        print(printable(dataset.report.describe()), flush=True)
        if data.show_sample:
            print(printable(describe_sample(dataset[0], plan.tokenizer)), flush=True)
    return dataset


def read_indexed(prefix: Path) -> Iterator[Tensor]:
    """The documents of a Megatron indexed dataset, each the tokens of its sequences one after the
    other: [s] int64. ConfigError for files that are none or do not belong together."""
    try:
        dataset = IndexedDataset(str(prefix))
    except (AssertionError, ValueError, OSError) as error:
        raise ConfigError(f"{prefix}.idx is no index of a Megatron dataset: {error}") from error
    index = dataset.index
    require(
        issubclass(index.dtype, numpy.integer),
        f"{prefix} must hold token ids and holds {index.dtype.__name__}",
    )
    wanted = int(index.sequence_lengths.sum(dtype=numpy.int64)) * index.dtype_size
    found = Path(f"{prefix}.bin").stat().st_size
    require(
        wanted == found,
        f"{prefix}.bin must have the {wanted:,} bytes that {prefix}.idx speaks of, and has "
        f"{found:,}; write the dataset again",
    )
    bounds = dataset.document_indices.tolist()
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        sequences = [dataset[i].astype(numpy.int64) for i in range(first, end)]
        yield torch.from_numpy(numpy.concatenate([numpy.empty(0, numpy.int64), *sequences]))
