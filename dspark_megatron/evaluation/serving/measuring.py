"""The work of `dspark served measure` on a rank."""

import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dspark_megatron.config import Config
from dspark_megatron.errors import require
from dspark_megatron.evaluation.report import text_table
from dspark_megatron.evaluation.serving.settings import StepSettings
from dspark_megatron.evaluation.serving.sps_table import SpsTable, write_sps_table
from dspark_megatron.evaluation.serving.verification_steps import measured_steps
from dspark_megatron.run.check import check
from dspark_megatron.run.known_draft import with_some_draft
from dspark_megatron.run.ranks.agreement import agree, agree_at_launch
from dspark_megatron.run.ranks.facts import launch_facts, target_facts
from dspark_megatron.run.ranks.places import at, set_time_limit
from dspark_megatron.run.ranks.runtime import Launch, start
from dspark_megatron.storage.writing import claim_file

COLUMNS = {"tokens": "d", "ms": ",.2f", "steps_per_second": ",.2f", "tokens_per_second": ",.1f"}


def run(job: Launch, config: Config, settings: StepSettings, output: Path) -> dict[str, Any]:
    """Measure, and write the table. Returns it with what its steps of one request took."""
    set_time_limit(config.train.timeout_minutes)
    own = {**asdict(settings), "output": output}
    agree_at_launch(job, launch_facts(config, command="served measure", **own))
    config = with_some_draft(config)
    check_decodes(config, job.world_size)
    config.evaluate.batch_size = max([1, *settings.requests])
    plan = check(config, job.world_size, use="evaluate")
    settings.check_positions(plan.shape.max_position_embeddings)
    claim_file(output, "--output")
    runtime = start(job, config.parallel.tensor_parallel)
    agree(target_facts(plan))
    at("measuring")
    table = measured_steps(plan, runtime, settings)
    steps = steps_of(table, settings.batch_tokens)
    if runtime.is_main:
        write_sps_table(output, table)
        for warning in warnings_of(steps):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    return {"output": str(output), "steps": steps, "table": asdict(table)}


def check_decodes(config: Config, world_size: int) -> None:
    """ConfigError unless the ranks are one copy of a target that has a key/value cache."""
    require(
        config.target.provider == "huggingface",
        "steps are measured with a key/value cache, which target.provider "
        f"{config.target.provider!r} has not; set target.provider=huggingface",
    )
    tp = config.parallel.tensor_parallel
    require(
        world_size == tp,
        f"one copy of the target is measured, and {world_size} processes were started; launch "
        f"parallel.tensor_parallel ({tp})",
    )


def steps_of(table: SpsTable, batch_tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """What each number of tokens of one request takes."""
    tokens = torch.tensor(sorted(set(batch_tokens)))
    rates = table.steps_per_second(tokens, 1).tolist()
    return [
        {"tokens": n, "ms": 1e3 / rate, "steps_per_second": rate, "tokens_per_second": n * rate}
        for n, rate in zip(tokens.tolist(), rates, strict=True)
    ]


def lines(record: dict[str, Any]) -> list[str]:
    """What `run` returns, for people."""
    return [text_table(record["steps"], COLUMNS), f"wrote {record['output']}"]


def warnings_of(steps: list[dict[str, Any]]) -> list[str]:
    """Where the table cannot be right."""
    return [
        f"{few['tokens']} tokens took longer than {many['tokens']}; take more --rounds, on a "
        "machine that does nothing else"
        for few, many in pairwise(steps)
        if few["ms"] > 1.1 * many["ms"]
    ]
