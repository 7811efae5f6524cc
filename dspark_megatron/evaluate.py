"""Evaluate a drafter: `torchrun --nproc-per-node N -m dspark_megatron.evaluate --config FILE ...`.

Of the config it needs the target, the prompts and a checkpoint, which knows its draft. Decodes
prompt files by real speculative decoding with the target and reports tau, acceptance by position
and speed, as a table and as JSON.
"""

import argparse
from pathlib import Path
from typing import Any


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a DSpark drafter.")
    parser.add_argument("--config", help="YAML file of a run; or give its keys as overrides")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    from dspark_megatron.run.runtime import launch

    with launch() as job:
        from dspark_megatron.config.loading import load_config
        from dspark_megatron.run.agreement import agree_at_launch
        from dspark_megatron.run.rank_facts import launch_facts

        config = load_config(arguments.config, arguments.overrides, trains=False)
        agree_at_launch(job, launch_facts(config, command="evaluate"))
        _evaluate(job, config)


def _evaluate(job: Any, config: Any) -> None:
    import torch

    from dspark_megatron.data.chats.answers import AnswerRules
    from dspark_megatron.data.prompts.chat_prompts import load_prompts
    from dspark_megatron.evaluation.estimate import EstimateSettings
    from dspark_megatron.evaluation.run import all_figures, estimates, evaluate_prompts
    from dspark_megatron.run.agreement import agree
    from dspark_megatron.run.rank_facts import prompt_facts, target_facts
    from dspark_megatron.run.runtime import main_ranks_folder, start
    from dspark_megatron.run.template_day import fix_template_day

    config, checkpoint = _with_checkpoint(config)
    settings = config.evaluate
    plan = _checked_plan(config, job.world_size)
    fix_template_day(plan, job.main_ranks)
    limits = settings.max_prompts, settings.max_prompt_length
    rules = AnswerRules(template_date=config.data.template_date)
    files = {
        path: load_prompts(path, plan.tokenizer, *limits, rules) for path in settings.prompt_files
    }
    _check_checkpoint(plan, checkpoint)
    cut = _scheduled_cut(settings, plan.shape.block_size, checkpoint)
    output = _claim_outputs(config)
    runtime = start(job, config.parallel.tensor_parallel)
    if checkpoint is not None:  # a run that goes on may have saved another one meanwhile
        checkpoint = main_ranks_folder(checkpoint, runtime)
    agree(target_facts(plan) | prompt_facts(files) | _file_facts(settings, checkpoint))
    first_prompt = torch.tensor([files[settings.prompt_files[0]][0].input_ids])
    decoder, iteration = _build_decoder(plan, runtime, checkpoint, first_prompt, cut)
    results = evaluate_prompts(
        decoder, files, settings, dp_group=runtime.dp_group, show_progress=runtime.is_main
    )
    ties = _ties(decoder, files, results, settings)
    facts = _facts(plan, checkpoint, iteration)
    figures = all_figures(results, plan.shape.block_size)
    for name, count in ties.items():
        figures[name]["ties_with_plain"] = count
    if runtime.is_main:
        _write(config, facts, files, results, figures, output)
    if cut is None:  # the estimate is of whole drafts
        pieces = EstimateSettings.of(config, decoder.draft)
        found = estimates(decoder, files, results, pieces, dp_group=runtime.dp_group)
        for name, estimate in found.items():
            figures[name]["estimate"] = estimate
    if runtime.is_main:
        _report(settings, facts, figures, output)


def _with_checkpoint(config: Any) -> tuple[Any, Path | None]:
    """The config with what the checkpoint knows, and the checkpoint; None for the untrained draft.
    ConfigError where there is nothing to evaluate, or nothing to decode with."""
    from dspark_megatron.errors import require
    from dspark_megatron.run.known_draft import evaluated_checkpoint, with_draft_of

    require(bool(config.evaluate.prompt_files), "evaluate.prompt_files is empty; name a JSONL file")
    require(
        not config.target.is_stored,
        "evaluation decodes with the target, and a cache has no states of new tokens; set "
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


def _checked_plan(config: Any, world_size: int) -> Any:
    """The run's plan; ConfigError when its draft cannot be evaluated like this."""
    from dspark_megatron.errors import require
    from dspark_megatron.run.check import check_decodes, check_run
    from dspark_megatron.shape.layout import target_shards
    from dspark_megatron.targets.huggingface.quantization import check_quantization

    plan = check_run(config, world_size)
    check_decodes(plan, config.evaluate.batch_size)
    check_quantization(plan.target_config, plan.target_split)
    require(
        target_shards(config.target, plan.dp_size) == 1,
        "evaluation decodes other prompts on each data-parallel rank, so these cannot share a copy "
        "of the target; set target.shard_across_data_parallel=1, with more tensor parallelism "
        "where the target does not fit",
    )
    tp, ep = config.parallel.tensor_parallel, config.parallel.expert_parallel
    require(
        config.target.provider != "megatron" or ep <= tp,
        "evaluation decodes other prompts on each data-parallel rank, so these cannot share "
        f"experts: parallel.expert_parallel ({ep}) must be at most parallel.tensor_parallel ({tp})",
    )
    return plan


def _check_checkpoint(plan: Any, checkpoint: Path | None) -> None:
    """ConfigError for a damaged checkpoint, or one of another target or draft."""
    from dspark_megatron.run.checkpoints import check_same_run
    from dspark_megatron.run.identity import draft_identity
    from dspark_megatron.storage.checkpoint_metadata import check_whole

    if checkpoint is not None:
        check_whole(checkpoint)
        check_same_run(checkpoint, draft_identity(plan))


def _file_facts(settings: Any, checkpoint: Path | None) -> dict[str, str]:
    """What else is read, for ranks to compare."""
    from dspark_megatron.conversion.sidecar import SIDECAR
    from dspark_megatron.run.rank_facts import file_digest, folder_facts

    return {
        **folder_facts("the checkpoint", checkpoint),
        "evaluate.sps_table's content": file_digest(Path(settings.sps_table)),
        "evaluate.temperatures' content": file_digest(Path(settings.temperatures) / SIDECAR),
    }


def _scheduled_cut(settings: Any, block_size: int, checkpoint: Path | None) -> Any:
    """The scheduler of the settings, None without one; ConfigError if its files cannot be used."""
    if settings.scheduler == "none":
        return None
    from dspark_megatron.conversion.sidecar import read_temperatures
    from dspark_megatron.evaluation.scheduled_cut import ScheduledCut
    from dspark_megatron.evaluation.serving.sps_table import read_sps_table, sps_of_step
    from dspark_megatron.storage.training_checkpoint import read_meta

    table = read_sps_table(settings.sps_table)
    sps_of_step(table, settings.batch_size, block_size)  # the largest step must be within it
    temperatures = None
    if settings.temperatures:
        iteration = read_meta(checkpoint)["iteration"] if checkpoint else 0
        folder = Path(settings.temperatures)
        temperatures = read_temperatures(folder, block_size, iteration, checkpoint)
    return ScheduledCut(settings.scheduler, table, block_size, temperatures)


def _claim_outputs(config: Any) -> Path:
    """Where the results go; ConfigError if any file could not be written."""
    from dspark_megatron.storage.writing import claim_file

    settings = config.evaluate
    output = Path(settings.output or f"{config.train.output_dir}/evaluation.json")
    claim_file(output, "evaluate.output")
    if settings.records:
        claim_file(Path(settings.records), "evaluate.records")
    return output


def _build_decoder(
    plan: Any, runtime: Any, checkpoint: Path | None, first_prompt: Any, cut: Any
) -> tuple[Any, int]:
    """The decoder of a checkpoint folder (null: the untrained draft) and its iteration.
    first_prompt [1, s]: token ids to check the teacher logits on."""
    from dspark_megatron.evaluation.decoding import Decoder, Sampling
    from dspark_megatron.run.agreement import agree
    from dspark_megatron.run.build import build_draft, build_target, load_target_head
    from dspark_megatron.run.checkpoints import load_checkpoint
    from dspark_megatron.run.initial.warm_start import WarmStart
    from dspark_megatron.run.rank_facts import draft_facts
    from dspark_megatron.storage.target_folder import stop_token_ids
    from dspark_megatron.targets.start_checks import check_pieces_agree, check_target_logits

    draft = build_draft(plan, runtime).eval()
    iteration = 0
    if checkpoint is not None:
        iteration = load_checkpoint(checkpoint, draft, optimizer=None).iteration
    elif warm_start := WarmStart.open(plan):
        warm_start.load(draft, tp_group=runtime.tp_group)
    agree(draft_facts(draft, runtime.tp_group.rank()))
    target = build_target(plan, runtime)
    target_head = load_target_head(plan, draft, target)
    if plan.config.target.check_logits:
        check_target_logits(
            target, plan.config.target.path, target_head, draft.vocab_shard, first_prompt
        )
    check_pieces_agree(target, first_prompt)
    settings = plan.config.evaluate
    stop_ids = stop_token_ids(plan.config.target.path, plan.tokenizer)
    sampling = Sampling(settings.temperature, settings.max_new_tokens, frozenset(stop_ids))
    decoder = Decoder(target, draft, target_head, sampling, batch_size=settings.batch_size, cut=cut)
    return decoder, iteration


def _ties(decoder: Any, files: dict, results: dict, settings: Any) -> dict[str, int]:
    """Greedy answers by file that part from the target's own at a tie; ConfigError for others."""
    from dspark_megatron.evaluation.lossless import check_lossless

    if settings.temperature > 0 or not settings.compare_plain:
        return {}
    ties = check_lossless(decoder, files, results)
    return {**ties, "all": sum(ties.values())} if len(ties) > 1 else ties


def _facts(plan: Any, checkpoint: Path | None, iteration: int) -> dict[str, Any]:
    """What was evaluated and how."""
    names = ("temperature", "max_new_tokens", "seed", "batch_size", "scheduler")
    return {
        "target": plan.config.target.path,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "iteration": iteration,
        "block_size": plan.shape.block_size,
        **{name: getattr(plan.config.evaluate, name) for name in names},
    }


def _write(
    config: Any, facts: dict, files: dict, results: dict, figures: dict, output: Path
) -> None:
    """What decoding gave, before anything else can fail."""
    from dspark_megatron.evaluation.run import draft_records
    from dspark_megatron.storage.writing import write_json

    write_json(output, {**facts, "files": figures})
    records = config.evaluate.records
    if records:
        counts = {"prompt_files": list(files), "prompts": [len(found) for found in files.values()]}
        draft_records(results, facts["block_size"], facts | counts).save(Path(records))
        print(f"wrote {records}", flush=True)


def _report(settings: Any, facts: dict, figures: dict, output: Path) -> None:
    """The table, and the figures with the estimates."""
    from dspark_megatron.evaluation.report import table
    from dspark_megatron.storage.writing import write_json

    write_json(output, {**facts, "files": figures})
    print(table(figures, greedy=settings.temperature == 0), flush=True)
    print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    main()
