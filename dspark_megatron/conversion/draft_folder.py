"""A draft in a Hugging Face folder of any layout, read strictly under the canonical names.

Every tensor of the folder is used exactly once. What is missing, unexpected or of another shape or
kind is listed at once, before any tensor is read; so is every setting that this project's draft
does not have, because taking such a draft for ours would change what it computes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.bounded_text import read_json
from dspark_megatron.conversion.engines.table import AUX
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.gemma4_config import (
    check_layout_of_gemma4,
    gemma4_description,
    is_gemma4,
)
from dspark_megatron.conversion.layouts.hf_config import DraftDescription, description_of_config
from dspark_megatron.conversion.layouts.names import (
    EMBEDDING,
    LM_HEAD,
    compare_tensors,
    hugging_face_shapes,
    raise_if_any,
)
from dspark_megatron.conversion.layouts.rope_config import chosen_rope, doubts
from dspark_megatron.conversion.layouts.table import LAYOUTS, check_dspark, detect_layout
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_schema import check_schema

PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)


class DraftFolder:
    """`description`, `layout`, and `tensor` by canonical name."""

    def __init__(
        self,
        path: str | Path,
        layout: str = "auto",
        target: TargetFacts | None = None,
        rope: dict[str, Any] | None = None,
    ) -> None:
        """layout: one of LAYOUTS, or `auto`. target: for what the config leaves to it. rope: keys
        of the RoPE that the user says otherwise than the config. Raises ConfigError that lists
        every problem."""
        self.path = Path(path)
        self.config = read_config(self.path)
        check_schema(self.config, self.path / "config.json")
        self.files = SafetensorsFolder(self.path)
        raw = self.files.shapes
        try:
            check_dspark(self.config, raw)
            self.layout = detect_layout(self.config, raw) if layout == "auto" else LAYOUTS[layout]
            self.description = self._read_description(target)
        except ConfigError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"{self.path}/config.json cannot be read as a draft's: a key has a value of "
                f"another kind than it must have ({error!r})"
            ) from error
        if rope:
            shape = replace(self.shape, rope_parameters=chosen_rope(self.shape, rope))
            self.description = replace(self.description, shape=shape)
        self.doubts = [] if rope else doubts(self.config, self.layout.name)
        """Lines on what the config says and may not be so."""
        self._names = self._canonical_names(raw)
        self._check_tensors()

    def _read_description(self, target: TargetFacts | None) -> DraftDescription:
        if is_gemma4(self.config):
            check_layout_of_gemma4(self.layout.name)
            return gemma4_description(self.config)
        canonical = self.layout.from_config(self.config, target)
        raise_if_any(_unsupported(canonical, self.files.shapes), f"the draft in {self.path}")
        return description_of_config(canonical)

    @property
    def shape(self) -> DraftShape:
        return self.description.shape

    @property
    def shared(self) -> list[str]:
        """Those of the target's two matrices that the folder holds."""
        return [name for name in (EMBEDDING, LM_HEAD) if name in self._names]

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._names)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor by its canonical name, in the type it is stored in."""
        return self.files.tensor(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.files.dtypes[self._names[name]]

    def _canonical_names(self, raw: dict[str, tuple[int, ...]]) -> dict[str, str]:
        """Names in the files by canonical name."""
        names: dict[str, str] = {}
        twice = []
        for theirs in raw:
            ours = self.layout.from_name(theirs)
            if ours in names:
                twice.append(f"{names[ours]} and {theirs} are both {ours}")
            names[ours] = theirs
        raise_if_any(twice, str(self.path))
        return names

    def _check_tensors(self) -> None:
        found = {ours: self.files.shapes[theirs] for ours, theirs in self._names.items()}
        expected = hugging_face_shapes(self.shape, shared_weights=True)
        for name in (EMBEDDING, LM_HEAD):
            if name not in found:  # the target has them
                del expected[name]
        problems = compare_tensors(expected, found)
        problems += [
            f"{name} has type {self.dtype(name)}, must be one of "
            + ", ".join(str(precision).removeprefix("torch.") for precision in PRECISIONS)
            for name in found
            if self.dtype(name) not in PRECISIONS
        ]
        shape = self.shape
        where = (
            f"{self.path}, read as {self.layout.name} with a {shape.markov_head_type} Markov head "
            f"of rank {shape.markov_rank} and {_confidence(shape)},"
        )
        raise_if_any(problems, where)


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a folder."""
    file = path / "config.json"
    require(file.is_file(), f"{path} has no config.json: it is no folder of a draft")
    return read_json(file)


def _unsupported(config: dict[str, Any], names: Any) -> list[str]:
    """Settings of other drafts that ours would not compute."""
    nested = config.get("dflash_config") or {}
    windows = {x for x in config.get("layer_types") or () if x != "full_attention"}
    reduced = [name for name in names if name in ("d2t", "t2d")]
    vocab = config.get("vocab_size")
    ids, aux = config.get("target_layer_ids"), config.get(AUX)
    rules = {
        "a quantized draft (quantization_config)": config.get("quantization_config"),
        f"attention layers {sorted(windows)}": windows,
        "sliding-window attention (use_sliding_window, use_swa)": config.get("use_sliding_window")
        or nested.get("use_swa"),
        "causal attention within a block (is_causal, dflash_config.causal)": config.get("is_causal")
        or nested.get("causal")
        or config.get("dflash_query_causal"),
        "attention biases (attention_bias)": config.get("attention_bias"),
        "blocks whose anchor is not drafted from (sample_from_anchor false)": False
        in (config.get("sample_from_anchor"), nested.get("sample_from_anchor")),
        "labels shifted by one position (dflash_config.shift_label false)": nested.get(
            "shift_label"
        )
        is False,
        **_scales(config, nested),
        "interleaved RoPE (is_neox_style false)": False
        in (config.get("is_neox_style"), config.get("rope_is_neox_style")),
        "attention sinks (attention_sink_bias)": config.get("attention_sink_bias")
        or nested.get("attention_sink_bias"),
        f"two sets of target layers: {AUX} {aux} counts the embedding, so it is not "
        f"target_layer_ids {ids}": ids and aux is not None and aux != [i + 1 for i in ids],
        "a draft vocabulary of its own (draft_vocab_size, d2t, t2d)": reduced
        or config.get("draft_vocab_size") not in (None, vocab),
        f"the activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        f"model_type {config.get('model_type')!r} instead of 'qwen3'": config.get(
            "model_type", "qwen3"
        )
        != "qwen3",
        "blocks whose anchor is not drafted from (dspark_bonus_anchor)": config.get(
            "dspark_bonus_anchor"
        ),
    }
    return [f"{rule}: not supported, and not to be left out" for rule, hit in rules.items() if hit]


def _scales(config: dict[str, Any], nested: dict[str, Any]) -> dict[str, bool]:
    return {
        f"{key} {value!r} instead of 1": value not in (None, 1)
        for key in ("logit_scale", "attention_value_scale")
        for value in (config.get(key), nested.get(key))
    }


def _confidence(shape: DraftShape) -> str:
    if not shape.enable_confidence_head:
        return "no confidence head"
    return f"a confidence head {'with' if shape.confidence_head_with_markov else 'without'} Markov"
