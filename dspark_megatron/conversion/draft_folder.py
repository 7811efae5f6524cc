"""A draft in a Hugging Face folder of any layout, read strictly under the canonical names.

Every tensor of the folder is used exactly once. What is missing, unexpected or of another shape or
kind is listed at once, before any tensor is read; so is every setting that this project's draft
does not have, because taking such a draft for ours would change what it computes.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.bounded_text import read_json
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.gemma4_config import (
    check_layout_of_gemma4,
    gemma4_description,
    is_gemma4,
)
from dspark_megatron.conversion.layouts.hf_config import DraftDescription, description_of_config
from dspark_megatron.conversion.layouts.known_keys import (
    key_problems,
    kind_problems,
    without_unknown,
)
from dspark_megatron.conversion.layouts.names import (
    EMBEDDING,
    LM_HEAD,
    compare_tensors,
    hugging_face_shapes,
    raise_if_any,
)
from dspark_megatron.conversion.layouts.other_files import unread_weights
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
        *,
        rope: dict[str, Any] | None = None,
        allow_unknown: Collection[str] = (),
    ) -> None:
        """layout: one of LAYOUTS, or `auto`. target: for what the config leaves to it. rope: keys
        of the RoPE that the user says otherwise than the config. allow_unknown: keys of config.json
        that are to be passed over though they are not known. Raises ConfigError that lists every
        problem."""
        self.path = Path(path)
        self.config = read_config(self.path)
        check_schema(self.config, self.path / "config.json")
        raise_if_any(kind_problems(self.config), f"{self.path}/config.json")
        self.files = SafetensorsFolder(self.path)
        raw = self.files.shapes
        try:
            check_dspark(self.config, raw)
            self.layout = detect_layout(self.config, raw) if layout == "auto" else LAYOUTS[layout]
            self.description = self._read_description(target, tuple(allow_unknown))
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

    def _read_description(
        self, target: TargetFacts | None, allow_unknown: tuple[str, ...]
    ) -> DraftDescription:
        where, files = f"the draft in {self.path}", set(self.files.files.values())
        unread = unread_weights(self.path, files)
        if is_gemma4(self.config):
            check_layout_of_gemma4(self.layout.name)
            raise_if_any(unread, where)
            return gemma4_description(self.config)
        config = without_unknown(self.config, self.layout.name, allow_unknown)
        problems = key_problems(config, self.layout.name) + unread
        problems += _unsupported(config, self.files.shapes)
        raise_if_any(problems, where)
        canonical = self.layout.from_config(config, target)
        return description_of_config(canonical, self.layout.meaning)

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
    """Values of known keys, and tensors, that only other drafts have."""
    backbone = {**(config.get("transformer_layer_config") or {}), **config}
    nested = config.get("dflash_config") or {}
    reduced = [name for name in names if name in ("d2t", "t2d")]
    vocab = backbone.get("vocab_size")
    kind, activation = backbone.get("model_type", "qwen3"), backbone.get("hidden_act", "silu")
    rules = {
        "labels shifted by one position (dflash_config.shift_label false)": nested.get(
            "shift_label"
        )
        not in (None, True),
        "a draft vocabulary of its own (draft_vocab_size, d2t, t2d)": reduced
        or backbone.get("draft_vocab_size") not in (None, vocab),
        f"the activation {activation!r}": activation != "silu",
        f"model_type {kind!r} instead of 'qwen3'": kind != "qwen3",
    }
    return [f"{rule}: not supported, and not to be left out" for rule, hit in rules.items() if hit]


def _confidence(shape: DraftShape) -> str:
    if not shape.enable_confidence_head:
        return "no confidence head"
    return f"a confidence head {'with' if shape.confidence_head_with_markov else 'without'} Markov"
