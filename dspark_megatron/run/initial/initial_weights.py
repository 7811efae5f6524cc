"""Weights to start a run from: another run's checkpoint, an import, or a draft folder as it is."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dspark_megatron.config import ModelConfig
from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.draft_tensors import fill_draft
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.names import check_megatron_tensors, raise_if_any
from dspark_megatron.conversion.target_match import not_finite, shared_problems
from dspark_megatron.errors import require
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.checkpoints.loading import load_checkpoint
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.checkpoints.whole import check_whole
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint

_FREE = ("block_size", "max_position_embeddings")
"""What a run may choose otherwise than the draft that it starts from: no tensor depends on it."""
_ROPE = "rope_parameters"
_ATTENTION = "model.attention."
_MEANING = {
    "sample_from_anchor": "which shifts what every slot drafts by one token",
    "architecture": "whose layers have other norms, values and scores",
}
"""What a change means for weights that would fit."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights that fit the run's draft."""

    path: Path
    folder: DraftFolder | None
    """None: `path` is an `iter_*` folder."""

    @classmethod
    def open(cls, plan: RunPlan) -> "InitialWeights | None":
        """Those of `train.initial_checkpoint`, or None where it is not set. Raises ConfigError for
        a path that holds neither, and for a draft of another shape, with what differs; in a run
        also for one of another target, and for values that are not finite."""
        if not plan.config.train.initial_checkpoint:
            return None
        path = Path(plan.config.train.initial_checkpoint)
        require(
            path.is_dir(),
            f"train.initial_checkpoint {path} is not a folder; give a run or its checkpoint, or "
            "the folder of a draft",
        )
        if is_draft_folder(path):
            return cls(path, open_draft_folder(plan, path, free=_FREE))
        reader = CheckpointReader(find_checkpoint(path))
        verify = plan.config.storage.verify if _reads_values() else "size"
        check_whole(reader.path, verify)
        check_megatron_tensors(reader.shape, reader.names(), str(reader.path))
        _check_shape(reader.shape, plan, reader.path, _FREE)
        if _reads_values():
            _check_target(reader.meta["target_fingerprint"], plan.target_fingerprint, reader.path)
            raise_if_any(_bad_values(reader.names(), reader.tensor), str(reader.path))
        return cls(reader.path, None)

    def describe(self) -> str:
        doubts = self.folder.doubts if self.folder else []
        return "\n".join([f"starting from the weights of {self.path}", *doubts])

    def load(self, draft: DSparkDraftModel, *, tp_group: dist.ProcessGroup) -> None:
        """Fill the draft's trained parameters; its embedding and LM head stay the target's. From a
        checkpoint collective over the world, from a folder each rank reads for itself."""
        if self.folder is None:
            load_checkpoint(self.path, draft, None)
        else:
            fill_draft(draft, self.folder.tensor, tp_group=tp_group)


def open_draft_folder(plan: RunPlan, path: Path, *, free: Sequence[str] = ()) -> DraftFolder:
    """A draft's folder whose weights fit the plan's draft and target; ConfigError as in
    `InitialWeights.open`. free: keys of the shape that may differ."""
    facts = TargetFacts.of(plan.target_config, plan.config.target.path)
    folder = DraftFolder(path, target=facts)
    _check_shape(folder.shape, plan, path, free)
    if _reads_values():
        target = plan.config.target
        problems = shared_problems(folder, target.path, target.checkpoint)
        raise_if_any(problems + _bad_values(folder.names(), folder.tensor), str(path))
    return folder


def is_draft_folder(path: Path) -> bool:
    """And not a run or a checkpoint."""
    return (path / "config.json").is_file() and not (path / "checkpoints").is_dir()


def initial_folder(path: Path) -> Path:
    """The folder that a start from this path reads."""
    return path if is_draft_folder(path) else find_checkpoint(path)


def _reads_values() -> bool:
    """One rank does, for all: the first failure ends every rank. A dry run has no ranks, and may
    be of a target whose weights are not there."""
    return dist.is_initialized() and dist.get_rank() == 0


def _bad_values(names: Iterable[str], get: Callable[[str], Tensor]) -> list[str]:
    return [line for name in names for line in not_finite(name, get(name))]


def _check_target(found: str, wanted: str, path: Path) -> None:
    require(
        found == wanted,
        f"train.initial_checkpoint {path} was trained for another target (fingerprint "
        f"{found[:12]}, here {wanted[:12]}); give that target, or, to go over to this one, export "
        "the draft with --no-shared-weights and start from the export",
    )


def _check_shape(found: DraftShape, plan: RunPlan, path: Path, free: Sequence[str]) -> None:
    if free and plan.config.train.initial_rope == "other":
        free = (*free, _ROPE)
    there, here = _told_apart(found), _told_apart(plan.shape)
    names = [key for key in {**here, **there} if key not in free]
    different = {key: (there.get(key), here.get(key)) for key in names}
    different = {key: both for key, both in different.items() if both[0] != both[1]}
    told = ", ".join(_difference(key, *both) for key, both in different.items())
    require(
        not different,
        f"{path} is of another draft: {told}; {_way_out(different)}, or name another",
    )


def _told_apart(shape: DraftShape) -> dict[str, Any]:
    """By the keys that a user sets: of attention each by itself."""
    keys = shape.to_dict()
    attention = keys.pop("attention")
    chosen = shape.attention.config(shape.num_layers)
    attention = attention if chosen is None else asdict(chosen)
    return {**keys, **{f"{_ATTENTION}{key}": value for key, value in attention.items()}}


def _difference(key: str, there: Any, here: Any) -> str:
    both = f"{key} ({_shown(there)} there, {_shown(here)} here)"
    return f"{both}, {_MEANING[key]}" if key in _MEANING else both


def _shown(value: Any) -> str:
    """As a YAML file has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _way_out(different: Mapping[str, tuple[Any, Any]]) -> str:
    if set(different) == {_ROPE}:
        there, _ = different[_ROPE]
        return (
            f"keep its RoPE with model.rope_parameters='{json.dumps(there)}', or go on with this "
            "run's, as the second stage for long contexts does, with train.initial_rope=other"
        )
    own = {field.name for field in fields(ModelConfig)}
    of_target = sorted(key for key in different if key not in own and _ATTENTION not in key)
    if of_target:
        return f"the target gives {', '.join(of_target)}, so use the one that it was trained for"
    return "set the model section to its values"
