"""The layouts that draft checkpoints come in: what each calls the tensors and writes as config.

One row each in LAYOUTS. `hf` is the canonical one: DeepSpec's tensor names under a config that most
engines read (`hf_config.py`). The others are told apart by what they rename, whether the target's
embedding and head belong to them, and two functions on config dicts (`foreign_configs.py`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dspark_megatron.conversion.layouts import foreign_configs
from dspark_megatron.conversion.layouts.attention_config import PLAIN, Meaning
from dspark_megatron.conversion.layouts.gemma4_config import gemma4_config
from dspark_megatron.conversion.layouts.hf_config import DraftDescription, hugging_face_config
from dspark_megatron.conversion.layouts.names import raise_if_any
from dspark_megatron.conversion.layouts.variants import unsayable
from dspark_megatron.errors import ConfigError, require

Config = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    name: str
    to_config: Callable[[Config, foreign_configs.TargetFacts], Config]
    """The layout's `config.json` from the canonical one."""
    from_config: Callable[[Config, foreign_configs.TargetFacts | None], Config]
    """The canonical config from the layout's, as far as it says; None: the target is not known."""
    shared_weights: bool = False
    """Whether the target's embedding and LM head belong to it."""
    renames: tuple[tuple[str, str], ...] = ()
    """Canonical beginnings of tensor names, and what the layout has instead."""
    meaning: Meaning = PLAIN
    """What its programs take for granted of attention."""

    def to_name(self, canonical: str) -> str:
        return _renamed(canonical, self.renames)

    def from_name(self, name: str) -> str:
        """The canonical name; beginnings that older programs wrote are taken off."""
        for prefix in OLD_PREFIXES:
            name = name.removeprefix(prefix)
        return _renamed(name, ((theirs, ours) for ours, theirs in self.renames))


FOREIGN = (
    *("layers.0.attention_conv.", "candidate_selector.", "prefix_gru.", "lilicorr."),
    *("midlayer.", "medusa_head.", "eagle_module.", "mtp."),
)
"""Beginnings of tensor names of DFlash2, Domino, LiLiCorr, EAGLE, Medusa and MTP drafts."""
OTHERS = ("eagle", "medusa", "mtp")
"""In names of architectures."""
OLD_PREFIXES = ("model.", "logit_head.")
"""A wrapper around the whole draft, and SpecForge's around its heads."""

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("hf", foreign_configs.same, foreign_configs.lifted, shared_weights=True),
        Layout(
            "speculators",
            foreign_configs.to_speculators,
            foreign_configs.from_speculators,
            meaning=Meaning(window_origin="anchor"),
        ),
        Layout(
            "modelopt",
            foreign_configs.to_modelopt,
            foreign_configs.from_modelopt,
            renames=(
                ("markov_head.markov_w1.", "markov_w1."),
                ("markov_head.markov_w2.", "markov_w2."),
                ("markov_head.gate_proj.", "gate_proj."),
                ("markov_head.joint_proj.", "joint_proj."),
                ("confidence_head.proj.", "confidence_proj."),
            ),
            meaning=Meaning(absent_causal=None),
        ),
        Layout("specforge", foreign_configs.to_specforge, foreign_configs.lifted),
    )
}


def config_of_draft(
    layout: Layout,
    description: DraftDescription,
    *,
    target_config: Any,
    facts: foreign_configs.TargetFacts,
    dtype: torch.dtype,
) -> Config:
    """The `config.json` of a draft in a layout. ConfigError where the layout cannot say it."""
    raise_if_any(unsayable(layout.name, description.shape), "the draft")
    if description.shape.architecture == "gemma4":
        return gemma4_config(description, target_config=target_config, dtype=dtype)
    canonical = hugging_face_config(description, target_config=target_config, dtype=dtype)
    return layout.to_config(canonical, facts)


def check_dspark(config: Config, names: Iterable[str]) -> None:
    """ConfigError for a draft of another kind, by its config and tensor names: its tensors may fit,
    and it would still compute something else."""
    nested = config.get("dflash_config") or {}
    names = list(names)
    kinds = {
        "speculators_model_type": config.get("speculators_model_type", "dspark"),
        "speculators_config.algorithm": (config.get("speculators_config") or {}).get(
            "algorithm", "dspark"
        ),
        "dflash_config.projector_type": nested.get("projector_type", "dspark"),
    }
    other = next((f"{key} {kind!r}" for key, kind in kinds.items() if kind != "dspark"), None)
    foreign = [n for n in names if n.startswith(FOREIGN)]
    if foreign:
        other = other or f"tensors {foreign[0]}{', ...' * (len(foreign) > 1)}"
    require(
        other is None,
        f"this is no DSpark draft: it has {other}; train a DSpark draft for its target, or take "
        "one of DeepSpec, speculators, ModelOpt or SpecForge",
    )
    architecture = str((config.get("architectures") or [""])[0])
    is_marked = nested.get("projector_type") == "dspark" or "use_confidence_head" in nested
    has_heads = any("markov_w1." in name or "confidence_" in name for name in names)
    require(
        "DFlash" not in architecture or is_marked or has_heads,
        f"this is a DFlash draft ({architecture} without dflash_config.projector_type 'dspark' and "
        "without a Markov head), and no DSpark draft: its slot 0 only carries the anchor, and each "
        "slot predicts one token earlier than DSpark's, so it would draft wrong tokens here "
        "whatever keys are added; train a DSpark draft for its target",
    )
    require(
        not any(kind in architecture.lower() for kind in OTHERS),
        f"this is no DSpark draft: its architecture is {architecture}; train a DSpark draft for "
        "its target",
    )


def detect_layout(config: Config, names: Iterable[str]) -> Layout:
    """The layout of a folder by its config and tensor names. ConfigError when it is none."""
    architecture = (config.get("architectures") or [None])[0]
    nested = config.get("dflash_config") or {}
    flat = any(name.startswith(("markov_w1.", "confidence_proj.")) for name in names)
    if "speculators_model_type" in config or "speculators_config" in config:
        return LAYOUTS["speculators"]
    if architecture == "DFlashDraftModel" or "use_confidence_head" in nested or flat:
        return LAYOUTS["modelopt"]
    if architecture == "DSparkDraftModel":
        return LAYOUTS["specforge"]
    if architecture == "Qwen3DSparkModel" or "markov_rank" in config:
        return LAYOUTS["hf"]
    raise ConfigError(
        f"this is no DSpark draft of a known layout ({', '.join(LAYOUTS)}): its architectures are "
        f"{config.get('architectures')}, and config.json has neither markov_rank nor "
        "speculators_config nor a dflash_config of ModelOpt; name the layout if you know it"
    )


def _renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
