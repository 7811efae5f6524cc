"""The table of docs/draft_variants.md: which engines load each variant of a draft in each layout,
by the verdicts on the config and the names of tensors that an export of it would have.

    python tools/engine_tables.py [--page docs/draft_variants.md]

With `--page` the table is put into the page, between the marks that it has for it.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scaling_tables import around_tables
from transformers import Qwen3Config

from dspark_megatron.conversion.engines.verdicts import ENGINES, Verdict, engine_verdicts
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.hf_config import DraftDescription
from dspark_megatron.conversion.layouts.names import hugging_face_shapes
from dspark_megatron.conversion.layouts.table import LAYOUTS, Layout, config_of_draft
from dspark_megatron.errors import ConfigError, printable
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.attention import DraftAttention

SHAPE = DraftShape(
    hidden_size=64,
    ffn_hidden_size=96,
    num_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    max_position_embeddings=4096,
    num_target_layers=8,
    target_layer_ids=(1, 3, 5),
    mask_token_id=127,
    block_size=7,
    markov_rank=8,
    markov_head_type="vanilla",
    enable_confidence_head=True,
    confidence_head_with_markov=True,
)


def _attends(**keys: Any) -> dict[str, Any]:
    return {"attention": DraftAttention(**keys)}


def _window(**keys: Any) -> dict[str, Any]:
    return _attends(**{"window": 2048, "sliding_layers": (0, 1, 2), **keys})


def _rope(**keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {**SHAPE.rope_parameters, **keys}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated or rnn Markov head": {"markov_head_type": "gated"},
    "no Markov head": {"markov_rank": 0, "confidence_head_with_markov": False},
    "confidence without Markov": {"confidence_head_with_markov": False},
    "no confidence head": {"enable_confidence_head": False, "confidence_head_with_markov": False},
    "window, causal": _window(causal_layers=(0, 1, 2)),
    "window, not causal": _window(),
    "window of some layers, causal there": _window(sliding_layers=(0, 1), causal_layers=(0, 1)),
    "window from the anchor, causal": _window(window_origin="anchor", causal_layers=(0, 1, 2)),
    "causal blocks, no window": _attends(causal_layers=(0, 1, 2)),
    "attention sinks": _attends(sink=True),
    "attention biases": _attends(biases=True),
    "the anchor drafts nothing": {"sample_from_anchor": False},
    "YaRN": _rope(**YARN),
    "YaRN with mscale keys": _rope(**YARN, mscale=1.0, mscale_all_dim=1.0),
    "linear or llama3 RoPE": _rope(rope_type="linear", factor=4.0),
    "RoPE of a part of each head": _rope(partial_rotary_factor=0.5),
    "scaled logits": {"logit_scale": 0.5},
    "Gemma-4 layers": {
        "architecture": "gemma4",
        "shared_key_value": True,
        "num_key_value_heads": 1,
        "logit_softcapping": 30.0,
        "rope_parameters": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
    },
}
"""What each has that a plain draft has not."""
TARGET = Qwen3Config(
    vocab_size=SHAPE.vocab_size,
    hidden_size=SHAPE.hidden_size,
    intermediate_size=96,
    num_hidden_layers=SHAPE.num_target_layers,
    num_attention_heads=4,
    num_key_value_heads=2,
    model_type="qwen3",
)
FACTS = TargetFacts.of(TARGET, "org/name")
SIGNS = {"loads": "yes", "warns": "yes, but", "refuses": "no"}


def table() -> Iterator[str]:
    """Lines of Markdown."""
    yield f"| draft | layout | {' | '.join(engine.name for engine in ENGINES)} |"
    yield "|---" * (len(ENGINES) + 2) + "|"
    for variant, changes in VARIANTS.items():
        shape = dataclasses.replace(SHAPE, **changes)
        for layout in LAYOUTS.values():
            for shared in (True, False) if layout.shared_weights else (False,):
                cells = _cells(layout, shape, shared)
                if cells:
                    name = layout.name + " without the target's matrices" * _bare(layout, shared)
                    yield f"| {variant} | {name} | {' | '.join(cells)} |"


def _bare(layout: Layout, shared: bool) -> bool:
    return layout.shared_weights and not shared


def _cells(layout: Layout, shape: DraftShape, shared: bool) -> list[str]:
    """Of each engine; none where the layout cannot say such a draft."""
    description = DraftDescription(shape=shape)
    try:
        config = config_of_draft(
            layout, description, target_config=TARGET, facts=FACTS, dtype=torch.bfloat16
        )
    except ConfigError:
        return []
    shapes = hugging_face_shapes(shape, shared_weights=shared)
    tensors = {layout.to_name(name): size for name, size in shapes.items()}
    return [_cell(verdict) for verdict in engine_verdicts(config, tensors, folder_name="draft")]


def _cell(verdict: Verdict) -> str:
    if not verdict.loads:
        return SIGNS["refuses"]
    return SIGNS["warns" if verdict.warnings else "loads"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Variants of drafts, layouts and engines.")
    parser.add_argument("--page", type=Path, help="put the table there, not on stdout")
    args = parser.parse_args(argv)
    text = "\n".join(table())
    if args.page is None:
        print(text)
        return
    from dspark_megatron.storage.writing import write_text

    try:
        before, after = around_tables(args.page)
        write_text(args.page, f"{before}\n{text}\n\n{after}")
    except ConfigError as error:
        sys.exit(f"error: {printable(str(error))}")


if __name__ == "__main__":
    main()
