"""The work of `dspark evaluate` on a rank."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.config import Config, EvaluateConfig
from dspark_megatron.config.loading import load_config
from dspark_megatron.conversion.sidecar import SIDECAR, read_temperatures
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.prompts.chat_prompts import Prompt, load_prompts
from dspark_megatron.errors import printable, require
from dspark_megatron.evaluation.decoding import Decoder, Sampling
from dspark_megatron.evaluation.estimate import EstimateSettings
from dspark_megatron.evaluation.lossless import check_lossless
from dspark_megatron.evaluation.report import context_table, table
from dspark_megatron.evaluation.run import (
    FileResult,
    all_figures,
    draft_records,
    estimates,
    evaluate_prompts,
)
from dspark_megatron.evaluation.scheduled_cut import ScheduledCut
from dspark_megatron.evaluation.serving.sps_table import read_sps_table, sps_of_step
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.ops.logit_transform import TargetHead
from dspark_megatron.run.build import build_draft, build_target, load_target_head
from dspark_megatron.run.check import RunPlan, check
from dspark_megatron.run.checkpoints.loading import load_checkpoint
from dspark_megatron.run.checkpoints.state import check_same_run
from dspark_megatron.run.identity import draft_identity, fix_template_day
from dspark_megatron.run.initial.warm_start import WarmStart
from dspark_megatron.run.known_draft import evaluated_checkpoint, with_draft_of
from dspark_megatron.run.ranks.agreement import Facts, agree, agree_at_launch
from dspark_megatron.run.ranks.facts import (
    draft_facts,
    file_digest,
    folder_facts,
    launch_facts,
    prompt_facts,
    target_facts,
)
from dspark_megatron.run.ranks.places import at, set_time_limit
from dspark_megatron.run.ranks.runtime import Launch, Runtime, main_ranks_folder, start
from dspark_megatron.storage.checkpoints.named import NamedCheckpoint
from dspark_megatron.storage.checkpoints.whole import check_whole
from dspark_megatron.storage.target_folder import stop_token_ids
from dspark_megatron.storage.training_checkpoint import check_has, read_meta
from dspark_megatron.storage.writing import claim_file, write_json
from dspark_megatron.targets.base import DecodingTarget
from dspark_megatron.targets.megatron.pipeline import PipelineTarget
from dspark_megatron.targets.start_checks import check_pieces_agree, check_target_logits


def run(job: Launch, arguments: Namespace) -> dict[str, Any]:
    config = load_config(arguments.config, arguments.overrides, trains=False)
    set_time_limit(config.train.timeout_minutes)
    agree_at_launch(job, launch_facts(config, command="evaluate"))
    return evaluate(job, config)


def evaluate(job: Launch, config: Config) -> dict[str, Any]:
    """What was evaluated, how, and the figures by prompt file."""
    config, checkpoint = with_checkpoint(config)
    settings = config.evaluate
    plan = check(config, job.world_size, use="evaluate")
    fix_template_day(plan, job.main_ranks)
    limits = settings.max_prompts, settings.max_prompt_length
    rules = AnswerRules(template_date=config.data.template_date)
    files = {
        path: load_prompts(path, plan.tokenizer, *limits, rules) for path in settings.prompt_files
    }
    if checkpoint is not None:
        check_checkpoint(plan, checkpoint, rank=job.rank)
    cut = _scheduled_cut(settings, plan.shape.num_draft_tokens, checkpoint)
    output = _claim_outputs(config)
    runtime = start(job, config.parallel.tensor_parallel, uneven=True)
    if checkpoint is not None:  # a run that goes on may have saved another one meanwhile
        checkpoint = main_ranks_folder(checkpoint, runtime)
    agree(target_facts(plan) | prompt_facts(files) | _file_facts(settings, checkpoint))
    first_prompt = torch.tensor([files[settings.prompt_files[0]][0].input_ids])
    decoder, iteration = build_decoder(plan, runtime, checkpoint, first_prompt, cut)
    at("decoding")
    results = evaluate_prompts(
        decoder, files, settings, dp_group=runtime.dp_group, show_progress=runtime.is_main
    )
    figures = all_figures(results, plan.shape.num_draft_tokens, settings.context_edges)
    for name, count in _ties(decoder, files, results, settings).items():
        figures[name]["ties_with_plain"] = count
    facts = _facts(plan, checkpoint, iteration)
    if runtime.is_main:  # before anything else can fail
        write_json(output, {**facts, "files": figures})
        _write_records(settings, facts, files, results)
    if cut is None:  # the estimate is of whole drafts
        pieces = EstimateSettings.of(config, decoder.draft)
        found = estimates(decoder, files, results, pieces, dp_group=runtime.dp_group)
        for name, estimate in found.items():
            figures[name]["estimate"] = estimate
    if runtime.is_main:
        write_json(output, {**facts, "files": figures})
        print(printable(table(figures, greedy=settings.temperature == 0)), flush=True)
        print(printable(context_table(figures, settings.context_edges)), flush=True)
        print(printable(f"wrote {output}"), flush=True)
    return {**facts, "files": figures}


def with_checkpoint(config: Config) -> tuple[Config, Path | None]:
    """The config with what the checkpoint knows, and the checkpoint; None for the untrained draft.
    ConfigError where there is nothing to evaluate, or nothing to decode with."""
    require(bool(config.evaluate.prompt_files), "evaluate.prompt_files is empty; name a file")
    require(
        not config.target.is_stored,
        "evaluation decodes with the target, and stored states have none of new tokens; set "
        "target.provider=huggingface",
    )
    checkpoint = evaluated_checkpoint(config)
    if checkpoint is None:
        require(
            bool(config.train.output_dir or config.evaluate.output),
            "evaluate.output is missing: an untrained draft has no folder to write into; name a "
            "JSON file",
        )
        return config, None
    config = with_draft_of(config, checkpoint)
    if not config.train.output_dir:  # results go beside the checkpoint's run
        config.train.output_dir = str(checkpoint.parent.parent)
    return config, checkpoint


def check_checkpoint(plan: RunPlan, checkpoint: Path, *, rank: int = 0) -> None:
    """ConfigError for a damaged checkpoint, one of another target or draft, or one without the
    weights that are asked for. The main rank alone
    reads all of it, where that is asked for."""
    check_whole(checkpoint, plan.config.storage.verify if rank == 0 else "size")
    check_same_run(checkpoint, draft_identity(plan))
    check_has(checkpoint, plan.config.evaluate.weights)


def _file_facts(settings: EvaluateConfig, checkpoint: Path | None) -> Facts:
    """What else is read, for ranks to compare."""
    return {
        **folder_facts("the checkpoint", checkpoint),
        "evaluate.sps_table's content": file_digest(Path(settings.sps_table)),
        "evaluate.temperatures' content": file_digest(Path(settings.temperatures) / SIDECAR),
    }


def _scheduled_cut(
    settings: EvaluateConfig, num_draft_tokens: int, checkpoint: Path | None
) -> ScheduledCut | None:
    """The scheduler of the settings, None without one; ConfigError if its files cannot be used."""
    if settings.scheduler == "none":
        return None
    sps = read_sps_table(settings.sps_table)
    sps_of_step(sps, settings.batch_size, num_draft_tokens)  # the largest step must be within it
    temperatures = None
    if settings.temperatures:
        iteration = read_meta(checkpoint)["iteration"] if checkpoint else 0
        folder = Path(settings.temperatures)
        named = NamedCheckpoint.at(checkpoint, settings.weights) if checkpoint else None
        temperatures = read_temperatures(folder, num_draft_tokens, iteration, named)
    return ScheduledCut(settings.scheduler, sps, num_draft_tokens, temperatures)


def _claim_outputs(config: Config) -> Path:
    """Where the results go; ConfigError if any file could not be written."""
    settings = config.evaluate
    output = Path(settings.output or f"{config.train.output_dir}/evaluation.json")
    claim_file(output, "evaluate.output")
    if settings.records:
        claim_file(Path(settings.records), "evaluate.records")
    return output


def build_decoder(
    plan: RunPlan,
    runtime: Runtime,
    checkpoint: Path | None,
    first_prompt: Tensor,
    cut: ScheduledCut | None,
) -> tuple[Decoder, int]:
    """The decoder of a checkpoint folder (None: the untrained draft) and its iteration.
    first_prompt [1, s]: token ids to check the target's logits on."""
    draft = build_draft(plan, runtime).eval()
    iteration, weights = 0, plan.config.evaluate.weights
    if checkpoint is not None:
        iteration = load_checkpoint(checkpoint, draft, None, weights=weights).iteration
    elif warm_start := WarmStart.open(plan):
        warm_start.load(draft, tp_group=runtime.tp_group)
    agree(draft_facts(draft, runtime.tp_group.rank()))
    target, path = build_target(plan, runtime), plan.config.target.path
    assert not isinstance(target, PipelineTarget), "the check refuses stages for this use"
    target_head = checked_head(plan, draft, target, first_prompt)
    settings, stop_ids = plan.config.evaluate, stop_token_ids(path, plan.tokenizer)
    sampling = Sampling(settings.temperature, settings.max_new_tokens, frozenset(stop_ids))
    decoder = Decoder(target, draft, target_head, sampling, batch_size=settings.batch_size, cut=cut)
    return decoder, iteration


def checked_head(
    plan: RunPlan, draft: DSparkDraftModel, target: DecodingTarget, first_prompt: Tensor
) -> TargetHead:
    """The target's LM head, compared with its own logits on a prompt [1, s]; ConfigError where they
    differ, or where the target does not go on from its cache as it should."""
    head = load_target_head(plan, draft, target)
    if plan.config.target.check_logits:
        path = plan.config.target.path
        check_target_logits(target, path, head, draft.vocab_shard, first_prompt)
    check_pieces_agree(target, first_prompt)
    return head


def _ties(
    decoder: Decoder,
    files: dict[str, list[Prompt]],
    results: dict[str, FileResult],
    settings: EvaluateConfig,
) -> dict[str, int]:
    """Greedy answers by file that part from the target's own at a tie; ConfigError for others."""
    if settings.temperature > 0 or not settings.compare_plain:
        return {}
    ties = check_lossless(decoder, files, results)
    return {**ties, "all": sum(ties.values())} if len(ties) > 1 else ties


def _facts(plan: RunPlan, checkpoint: Path | None, iteration: int) -> dict[str, Any]:
    """What was evaluated and how."""
    weights = plan.config.evaluate.weights
    named = NamedCheckpoint.at(checkpoint, weights).facts() if checkpoint else {"checkpoint": None}
    names = (
        *("temperature", "max_new_tokens", "seed", "batch_size", "scheduler"),
        "context_edges",
    )
    return {
        "target": plan.config.target.path,
        **named,
        "iteration": iteration,
        "block_size": plan.shape.block_size,
        "num_draft_tokens": plan.shape.num_draft_tokens,
        **{name: getattr(plan.config.evaluate, name) for name in names},
    }


def _write_records(
    settings: EvaluateConfig,
    facts: dict[str, Any],
    files: dict[str, list[Prompt]],
    results: dict[str, FileResult],
) -> None:
    if not settings.records:
        return
    counts = {"prompt_files": list(files), "prompts": [len(found) for found in files.values()]}
    records = draft_records(results, facts["num_draft_tokens"], facts | counts)
    records.save(Path(settings.records))
    print(printable(f"wrote {settings.records}"), flush=True)
