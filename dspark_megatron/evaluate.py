"""Evaluate a drafter: `torchrun --nproc-per-node N -m dspark_megatron.evaluate --config FILE ...`.

Decodes prompt files by real speculative decoding with the target and reports tau, acceptance by
position and speed, as a table and as JSON.
"""

import argparse
from pathlib import Path
from typing import Any


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a DSpark drafter.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    from dspark_megatron.training.runtime import launch

    with launch() as job:
        from dspark_megatron.config_file import load_config

        _evaluate(job, load_config(arguments.config, arguments.overrides))


def _evaluate(job: Any, config: Any) -> None:
    import torch

    from dspark_megatron.config import require
    from dspark_megatron.conversion.megatron_checkpoint import find_checkpoint
    from dspark_megatron.data.prompts import load_prompts
    from dspark_megatron.evaluation.report import table
    from dspark_megatron.evaluation.run import (
        all_figures,
        claim_file,
        draft_records,
        evaluate_prompts,
        write_results,
    )
    from dspark_megatron.shape import target_shards
    from dspark_megatron.targets.quantization import check_quantization
    from dspark_megatron.training.checkpointing import check_same_run
    from dspark_megatron.training.runtime import start
    from dspark_megatron.training.setup import check_run, draft_identity

    settings = config.evaluate
    require(bool(settings.prompt_files), "evaluate.prompt_files is empty; name a JSONL file")
    plan = check_run(config, job.world_size)
    check_quantization(plan.target_config, plan.target_split)
    require(
        target_shards(config.target, plan.dp_size) == 1,
        "evaluation decodes other prompts on each data-parallel rank, so these cannot share a copy "
        "of the target; set target.shard_across_data_parallel=1, with more tensor parallelism "
        "where the target does not fit",
    )
    limits = settings.max_prompts, settings.max_prompt_length
    files = {path: load_prompts(path, plan.tokenizer, *limits) for path in settings.prompt_files}
    folder = None
    if not settings.untrained:
        folder = find_checkpoint(settings.checkpoint or config.train.output_dir)
        check_same_run(folder, draft_identity(plan))
    output = Path(settings.output or f"{config.train.output_dir}/evaluation.json")
    claim_file(output, "evaluate.output")
    if settings.records:
        claim_file(Path(settings.records), "evaluate.records")
    cut = _scheduled_cut(settings, plan.shape.block_size, folder)
    runtime = start(job, config.parallel.tensor_parallel)
    first_prompt = torch.tensor([files[settings.prompt_files[0]][0].input_ids])
    decoder, iteration = _build_decoder(plan, runtime, folder, first_prompt, cut)
    results = evaluate_prompts(
        decoder, files, settings, dp_group=runtime.dp_group, show_progress=runtime.is_main
    )
    if not runtime.is_main:
        return
    block_size = plan.shape.block_size
    facts = {
        "target": config.target.path,
        "checkpoint": str(folder) if folder else None,
        "iteration": iteration,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "block_size": block_size,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "scheduler": settings.scheduler,
    }
    figures = all_figures(results, block_size)
    print(table(figures, greedy=settings.temperature == 0), flush=True)
    write_results(output, {**facts, "files": figures})
    print(f"wrote {output}", flush=True)
    if settings.records:
        facts["prompt_files"] = settings.prompt_files
        draft_records(results, block_size, facts).save(Path(settings.records))
        print(f"wrote {settings.records}", flush=True)


def _scheduled_cut(settings: Any, block_size: int, checkpoint: Path | None) -> Any:
    """The scheduler of the settings, None without one; ConfigError if its files cannot be used."""
    if settings.scheduler == "none":
        return None
    from dspark_megatron.conversion.megatron_checkpoint import read_meta
    from dspark_megatron.conversion.sidecar import read_temperatures
    from dspark_megatron.evaluation.scheduled_cut import ScheduledCut
    from dspark_megatron.evaluation.sps_table import read_sps_table, sps_of_step

    table = read_sps_table(settings.sps_table)
    sps_of_step(table, settings.batch_size, block_size)  # the largest step must be within it
    temperatures = None
    if settings.temperatures:
        iteration = read_meta(checkpoint)["iteration"] if checkpoint else 0
        temperatures = read_temperatures(Path(settings.temperatures), block_size, iteration)
    return ScheduledCut(settings.scheduler, table, block_size, temperatures)


def _build_decoder(
    plan: Any, runtime: Any, folder: Path | None, first_prompt: Any, cut: Any
) -> tuple[Any, int]:
    """The decoder of a checkpoint folder (null: the untrained draft) and its iteration.
    first_prompt [1, s]: token ids to check the teacher logits on."""
    from dspark_megatron.evaluation.decoding import Decoder, Sampling
    from dspark_megatron.target_folder import stop_token_ids
    from dspark_megatron.targets.teacher_check import check_teacher_logits
    from dspark_megatron.training.checkpointing import load_checkpoint
    from dspark_megatron.training.setup import (
        build_draft,
        build_target,
        load_target_head,
    )

    draft = build_draft(plan, runtime).eval()
    iteration = 0
    if folder is not None:
        iteration = load_checkpoint(folder, draft, optimizer=None).iteration
    target = build_target(plan, runtime)
    target_head = load_target_head(plan, draft, target)
    if plan.config.target.check_teacher_logits:
        check_teacher_logits(
            target, plan.config.target.path, target_head, draft.vocab_shard, first_prompt
        )
    settings = plan.config.evaluate
    stop_ids = stop_token_ids(plan.config.target.path, plan.tokenizer)
    sampling = Sampling(settings.temperature, settings.max_new_tokens, frozenset(stop_ids))
    decoder = Decoder(target, draft, target_head, sampling, batch_size=settings.batch_size, cut=cut)
    return decoder, iteration


if __name__ == "__main__":
    main()
