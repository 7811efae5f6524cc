"""Evaluate a draft on prompt files: decode every prompt, count, report."""

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from dspark_megatron.config import ConfigError, EvaluateConfig
from dspark_megatron.data.prompts import Prompt
from dspark_megatron.evaluation.decoding import Decoder
from dspark_megatron.evaluation.report import Pair, acceptance


def evaluate_prompts(
    decoder: Decoder,
    files: dict[str, list[Prompt]],
    config: EvaluateConfig,
    *,
    dp_group: dist.ProcessGroup,
    show_progress: bool,
) -> dict[str, dict[str, Any]]:
    """Figures by file name, and over all files under `all`. Prompts are dealt out to data-parallel
    ranks; a prompt's random numbers depend on its place in its file alone."""
    block_size = decoder.draft.shape.block_size
    everything: list[Pair] = []
    results = {}
    for name, prompts in files.items():
        mine = range(dp_group.rank(), len(prompts), dp_group.size())
        pairs = [
            _decode(decoder, prompts[i], config, config.seed + i)
            for i in tqdm(mine, desc=name, unit="prompt", disable=not show_progress)
        ]
        pairs = _gather(pairs, dp_group)
        everything += pairs
        results[name] = acceptance(pairs, block_size)
    if len(files) > 1:
        results["all"] = acceptance(everything, block_size)
    return results


def claim_file(path: Path) -> None:
    """Make the folder of a file to be written later; ConfigError if it will not be possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".partial_{path.name}.{os.getpid()}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"evaluate.output {path} must be writable: {error.strerror}") from error


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the JSON whole or not at all."""
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _decode(decoder: Decoder, prompt: Prompt, config: EvaluateConfig, seed: int) -> Pair:
    speculative = decoder.speculative(prompt.input_ids, seed)
    plain = decoder.plain(prompt.input_ids, seed) if config.compare_plain else None
    return speculative, plain


def _gather(pairs: list[Pair], dp_group: dist.ProcessGroup) -> list[Pair]:
    """All ranks' pairs, rank by rank. One all-gather of Python objects."""
    if dp_group.size() == 1:
        return pairs
    shares: list[list[Pair]] = [[] for _ in range(dp_group.size())]
    dist.all_gather_object(shares, pairs, group=dp_group)
    return [pair for share in shares for pair in share]
