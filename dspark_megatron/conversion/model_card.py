"""README.md of an export: what the draft is, how it was trained, how to serve it."""

import hashlib
import json
from typing import Any

from dspark_megatron.conversion.engines.table import SGLANG, VLLM
from dspark_megatron.conversion.layouts.description import DraftDescription

WHOSE = {
    "hf": "DeepSpec's names, under a config that serving engines read too",
    "speculators": "that of the speculators library",
    "modelopt": "ModelOpt's; serving engines do not read it",
    "specforge": "SpecForge's",
}
"""By layout."""


def model_card(
    description: DraftDescription,
    *,
    layout: str,
    target: str,
    folder: str,
    engines: set[str],
    history: dict[str, Any],
    with_temperatures: bool,
) -> str:
    """folder: the export's name; engines: those that load it; history: iterations, samples and
    evaluation, as far as they are known; with_temperatures: a `dspark_sts.json` lies in it."""
    shape = description.shape
    confidence = "no confidence head"
    if shape.enable_confidence_head:
        with_markov = "with" if shape.confidence_head_with_markov else "without"
        confidence = f"a confidence head {with_markov} the Markov embedding"
    markov = "no Markov head"
    if shape.markov_rank:
        markov = f"a {shape.markov_head_type} Markov head of rank {shape.markov_rank}"
    parts = [
        f"# DSpark drafter for {target}",
        f"A speculative-decoding draft of {shape.num_layers} layers with {markov} and "
        f"{confidence}: {shape.block_size} draft tokens a round, from the outputs of the target's "
        f"layers {list(shape.target_layer_ids)} (0-based, of {shape.num_target_layers}). It works "
        "with this target only.",
        *_training(history),
        f"## Layout\n\n`{layout}`: {WHOSE[layout]}.",
        *_serving(description, engines, target, folder, with_temperatures),
        "## License\n\n<!-- To be filled in by whoever publishes this draft. -->",
    ]
    text = "\n\n".join(parts) + "\n"
    return f"{text}\n{_mark(text)}\n"


def is_unedited(card: str) -> bool:
    """Whether the text of a model card is as it was written."""
    text, _, mark = card.rstrip("\n").rpartition("\n")
    return mark == _mark(text)


def _mark(text: str) -> str:
    """An invisible line by which a card that somebody has worked on is told from a new one."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()
    return f"<!-- dspark-megatron {digest[:16]} -->"


def _training(history: dict[str, Any]) -> list[str]:
    lines = []
    if "iterations" in history:
        lines.append(
            f"{history['iterations']:,} iterations over {history['samples']:,} samples (repeated "
            "ones counted each time), with dspark-megatron."
        )
    evaluation = history.get("evaluation")
    if evaluation:
        rows = [
            f"| {name} | {figures['prompts']} | {_number(figures['tau'])} |"
            for name, figures in evaluation["files"].items()
        ]
        lines.append(
            f"Mean tokens of a round (tau, bonus token included) at temperature "
            f"{evaluation['temperature']:g}:"
        )
        lines.append("\n".join(["| prompts | number | tau |", "|---|---|---|", *rows]))
    return ["## Training", *lines] if lines else []


def _serving(
    description: DraftDescription,
    engines: set[str],
    target: str,
    folder: str,
    with_temperatures: bool,
) -> list[str]:
    """Commands of those of vLLM and SGLang that load the folder."""
    commands = []
    tokens = description.shape.block_size
    vllm = {
        "method": "dspark",
        "model": folder,
        "num_speculative_tokens": tokens,
        "attention_backend": "FLASH_ATTN",
        "draft_sample_method": "probabilistic",
    }
    if description.shape.enable_confidence_head:
        vllm["enable_adaptive_verification"] = True
    if VLLM in engines:
        commands.append(f"vllm serve {target} --speculative-config '{json.dumps(vllm)}'")
    if SGLANG in engines:
        sglang = (
            f"python -m sglang.launch_server --model-path {target} "
            f"--speculative-algorithm DSPARK --speculative-draft-model-path {folder}"
        )
        if with_temperatures:
            sglang = (
                f"SGLANG_RAGGED_VERIFY_MODE=compact {sglang} "
                f"--speculative-dspark-confidence-sts-path {folder}/dspark_sts.json"
            )
        commands.append(sglang)
    if not commands:
        return ["## Serving\n\nNeither vLLM nor SGLang loads this folder."]
    return [
        "## Serving\n\n```\n" + "\n\n".join(commands) + "\n```",
        "The commands follow the engines' documented options; they were not run in making this "
        "folder. `python tools/convert_checkpoint.py verify` says which engines can load it.",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
