"""The work of `dspark evaluate` on a rank."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.config import Config, EvaluateConfig
from dspark_megatron.config.loading import load_config, nested_overrides
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.prompts.chat_prompts import Prompt, load_prompts
from dspark_megatron.errors import printable, require
from dspark_megatron.evaluation.decoding import Decoder, Sampling
from dspark_megatron.evaluation.drafts import EvaluatedDraft, evaluated_drafts, load_draft
from dspark_megatron.evaluation.estimate import EstimateSettings
from dspark_megatron.evaluation.lossless import check_lossless
from dspark_megatron.evaluation.report import context_table, drafts_table, table
from dspark_megatron.evaluation.run import (
    FileResult,
    add_differences,
    all_figures,
    draft_records,
    estimates,
    evaluate_prompts,
)
from dspark_megatron.evaluation.scheduled_cut import ScheduledCut
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.ops.logit_transform import TargetHead
from dspark_megatron.run.build import build_target, load_target_head
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.known_draft import without_draft
from dspark_megatron.run.ranks.agreement import agree, agree_at_launch
from dspark_megatron.run.ranks.facts import launch_facts, prompt_facts, target_facts
from dspark_megatron.run.ranks.places import at, set_time_limit
from dspark_megatron.run.ranks.runtime import Launch, Runtime, start
from dspark_megatron.storage.target_folder import stop_token_ids
from dspark_megatron.storage.writing import claim_file, write_json
from dspark_megatron.targets.base import DecodingTarget
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget
from dspark_megatron.targets.megatron.pipeline import PipelineTarget
from dspark_megatron.targets.megatron.target import MegatronTarget
from dspark_megatron.targets.start_checks import check_pieces_agree, check_target_logits


def run(job: Launch, arguments: Namespace) -> dict[str, Any]:
    """arguments: `config`, a file or None; `overrides`; `drafts`, the runs, checkpoints and folders
    that are evaluated, none where the config says which."""
    config = load_config(arguments.config, arguments.overrides, trains=False)
    set_time_limit(config.train.timeout_minutes)
    agree_at_launch(job, launch_facts(config, command="evaluate", drafts=arguments.drafts))
    if arguments.drafts:
        asked = nested_overrides(arguments.overrides).get("model", {})
        config = without_draft(config, keep=asked)
    return evaluate(job, config, arguments.drafts)


def evaluate(job: Launch, config: Config, names: Sequence[str] = ()) -> dict[str, Any]:
    """What was evaluated, how, and the figures by prompt file; of several drafts, a list of this.
    Drafts follow one another with the same target, which decodes alone once for all of them."""
    drafts = evaluated_drafts(job, config, names)
    plan = drafts[0].plan
    settings, files = plan.config.evaluate, _prompts(plan)
    output = _claim_outputs(plan.config, len(drafts))
    runtime = start(job, plan.config.parallel.tensor_parallel, uneven=True)
    drafts = [draft.as_main_rank(runtime) for draft in drafts]
    agree(target_facts(plan) | prompt_facts(files))
    for draft in drafts:
        agree(draft.file_facts())
    work = _Work(runtime, files, settings)
    records: list[dict[str, Any]] = []
    for draft in drafts:
        decoder, facts, results = work.decode(draft)
        figures = work.figures(decoder, results)
        records.append({**facts, "files": figures})
        whole = {"drafts": records} if len(drafts) > 1 else records[0]
        if runtime.is_main:  # before anything else can fail
            _write(output, whole)
            _write_records(settings, facts, files, results)
        if draft.cut is None:  # the estimate is of whole drafts
            work.add_estimates(draft.plan.config, decoder, results, figures)
    if runtime.is_main:
        _write(output, whole)
        _show(records, settings)
        where = (
            f"wrote {output}" if output else "the figures are not written; --output FILE keeps them"
        )
        print(printable(where), flush=True)
    return whole


class _Work:
    """Prompts, the target that decodes them, and what the first draft made of them."""

    def __init__(
        self, runtime: Runtime, files: dict[str, list[Prompt]], settings: EvaluateConfig
    ) -> None:
        self.runtime, self.files, self.settings = runtime, files, settings
        self._first_prompt = torch.tensor([next(iter(files.values()))[0].input_ids])
        self._target: HuggingFaceTarget | MegatronTarget | None = None
        self._first: dict[str, FileResult] = {}

    def decode(
        self, draft: EvaluatedDraft
    ) -> tuple[Decoder, dict[str, Any], dict[str, FileResult]]:
        """The decoder, what was evaluated, and the results by file."""
        decoder, iteration = build_decoder(
            draft.plan, self.runtime, draft.source, self._first_prompt, draft.cut, self._target
        )
        at("decoding")
        results = evaluate_prompts(
            decoder,
            self.files,
            self.settings,
            dp_group=self.runtime.dp_group,
            show_progress=self.runtime.is_main,
            plain={name: first.plain for name, first in self._first.items()},
        )
        assert isinstance(decoder.target, HuggingFaceTarget | MegatronTarget)
        self._target = decoder.target
        return decoder, draft.facts(iteration), results

    def figures(
        self, decoder: Decoder, results: dict[str, FileResult]
    ) -> dict[str, dict[str, Any]]:
        """By file name, after the check that nothing was lost."""
        settings = self.settings
        slots = decoder.draft.shape.num_draft_tokens
        figures = all_figures(results, slots, settings.context_edges)
        for name, count in _ties(decoder, self.files, results, settings).items():
            figures[name]["ties_with_plain"] = count
        if self._first:
            add_differences(figures, results, self._first)
        self._first = self._first or results
        return figures

    def add_estimates(
        self,
        config: Config,
        decoder: Decoder,
        results: dict[str, FileResult],
        figures: dict[str, dict[str, Any]],
    ) -> None:
        pieces = EstimateSettings.of(config, decoder.draft)
        group = self.runtime.dp_group
        for name, estimate in estimates(
            decoder, self.files, results, pieces, dp_group=group
        ).items():
            figures[name]["estimate"] = estimate


def _prompts(plan: RunPlan) -> dict[str, list[Prompt]]:
    settings = plan.config.evaluate
    limits = settings.max_prompts, settings.max_prompt_length
    rules = AnswerRules(template_date=plan.config.data.template_date)
    return {
        path: load_prompts(path, plan.tokenizer, *limits, rules) for path in settings.prompt_files
    }


def _claim_outputs(config: Config, drafts: int) -> Path | None:
    """Where the results go, None where nothing is named; ConfigError if any file could not be
    written."""
    settings, folder = config.evaluate, config.train.output_dir
    require(
        not settings.records or drafts == 1,
        f"evaluate.records keeps the rounds of one draft, and {drafts} are named; leave it out, or "
        "evaluate them one by one",
    )
    output = None
    if settings.output or (folder and drafts == 1):
        output = Path(settings.output or f"{folder}/evaluation.json")
        claim_file(output, "evaluate.output")
    if settings.records:
        claim_file(Path(settings.records), "evaluate.records")
    return output


def build_decoder(
    plan: RunPlan,
    runtime: Runtime,
    source: Path | None,
    first_prompt: Tensor,
    cut: ScheduledCut | None,
    built: HuggingFaceTarget | MegatronTarget | None = None,
) -> tuple[Decoder, int | None]:
    """The decoder of a checkpoint or a draft's folder (None: the untrained draft) and its iteration
    (None: a folder's). first_prompt [1, s]: token ids to check the target's logits on. built: the
    target of another decoder, whose weights this one shares."""
    draft, iteration = load_draft(plan, runtime, source)
    target, path = build_target(plan, runtime, built=built), plan.config.target.path
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


def _write(output: Path | None, record: dict[str, Any]) -> None:
    if output is not None:
        write_json(output, record)


def _show(records: list[dict[str, Any]], settings: EvaluateConfig) -> None:
    greedy = settings.temperature == 0
    if len(records) > 1:
        lines = [drafts_table({r["draft"]: r["files"] for r in records}, greedy)]
    else:
        files = records[0]["files"]
        lines = [table(files, greedy), context_table(files, settings.context_edges)]
    for text in lines:
        print(printable(text), flush=True)


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
