"""README.md of an export: what the draft is, how it was trained, how to serve it. Its text is in
`model_card.md.jinja`."""

import hashlib
import json
import re
from shlex import quote
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dspark_megatron.conversion.engines.table import SGLANG, VLLM
from dspark_megatron.conversion.layouts.hf_config import DraftDescription
from dspark_megatron.errors import require
from dspark_megatron.ops.logit_transform import LogitTransform
from dspark_megatron.shape import DraftShape

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
    check_name("the target", target)
    check_name("the export's folder", folder)
    shape = description.shape
    confidence, markov = "no confidence head", "no Markov head"
    if shape.enable_confidence_head:
        with_markov = "with" if shape.confidence_head_with_markov else "without"
        confidence = f"a confidence head {with_markov} the Markov embedding"
    if shape.markov_rank:
        markov = f"a {shape.markov_head_type} Markov head of rank {shape.markov_rank}"
    commands = {
        VLLM: _vllm_command(shape, target, folder),
        SGLANG: _sglang_command(target, folder, with_temperatures),
    }
    templates = Environment(  # of Markdown, where HTML's escapes would be text
        loader=PackageLoader("dspark_megatron.conversion", ""),
        autoescape=False,
        finalize=_as_text,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    transform = LogitTransform(shape.logit_scale, shape.logit_softcapping)
    text = templates.get_template("model_card.md.jinja").render(
        shape=shape,
        base_logits="" if transform.is_identity else transform.describe(),
        markov=markov,
        confidence=confidence,
        target=target,
        history=history,
        layout=layout,
        whose=WHOSE[layout],
        commands=[text for engine, text in commands.items() if engine in engines],
    )
    return f"{text}\n\n{_mark(text)}\n"


def check_name(what: str, name: str) -> None:
    """ConfigError for a name that could write lines of its own."""
    require(
        name.isprintable() and bool(name.strip()),
        f"the name of {what} ({name!r}) must be one line of printable text; give another one",
    )


def _as_text(value: Any) -> Any:
    """A value of the template, a text so that Markdown and HTML show it as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|~&$#!])", r"\\\1", " ".join(value.split()))


def is_unedited(card: str) -> bool:
    """Whether the text of a model card is as it was written."""
    text, _, mark = card.rstrip("\n").rpartition("\n")
    return mark == _mark(text)


def _mark(text: str) -> str:
    """An invisible line by which a card that somebody has worked on is told from a new one."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()
    return f"<!-- dspark-megatron {digest[:16]} -->"


def _vllm_command(shape: DraftShape, target: str, folder: str) -> str:
    options = {
        "method": "dspark",
        "model": folder,
        "num_speculative_tokens": shape.num_draft_tokens,
        "attention_backend": "FLASH_ATTN",
        "draft_sample_method": "probabilistic",
    }
    if shape.enable_confidence_head:
        options["enable_adaptive_verification"] = True
    return f"vllm serve {quote(target)} --speculative-config {quote(json.dumps(options))}"


def _sglang_command(target: str, folder: str, with_temperatures: bool) -> str:
    command = (
        f"python -m sglang.launch_server --model-path {quote(target)} "
        f"--speculative-algorithm DSPARK --speculative-draft-model-path {quote(folder)}"
    )
    if not with_temperatures:
        return command
    sidecar = f"--speculative-dspark-confidence-sts-path {quote(f'{folder}/dspark_sts.json')}"
    return f"SGLANG_RAGGED_VERIFY_MODE=compact {command} {sidecar}"
