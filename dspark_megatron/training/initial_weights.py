"""Weights to start a run from: another run's checkpoint, an import, or a draft folder as it is."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dspark_megatron.config import require
from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.fill_draft import fill_draft
from dspark_megatron.conversion.foreign_configs import TargetFacts
from dspark_megatron.conversion.megatron_checkpoint import CheckpointReader, find_checkpoint
from dspark_megatron.conversion.names import check_megatron_tensors
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.shape import DraftShape
from dspark_megatron.training.checkpointing import load_checkpoint
from dspark_megatron.training.setup import RunPlan

_FREE = ("block_size", "max_position_embeddings")
"""What a run may choose otherwise than the draft that it starts from: no tensor depends on it."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights that fit the run's draft; nothing but names and shapes has been read of them."""

    path: Path
    folder: DraftFolder | None
    """None: `path` is an `iter_*` folder."""

    @classmethod
    def open(cls, plan: RunPlan) -> "InitialWeights | None":
        """Those of `train.initial_checkpoint`, or None where it is not set. Raises ConfigError for
        a path that holds neither, and for a draft of another shape, with what differs."""
        if not plan.config.train.initial_checkpoint:
            return None
        path = Path(plan.config.train.initial_checkpoint)
        require(
            path.is_dir(),
            f"train.initial_checkpoint {path} is not a folder; give a run or its checkpoint, or "
            "the folder of a draft",
        )
        if (path / "config.json").is_file():
            facts = TargetFacts.of(plan.target_config, plan.config.target.path)
            folder = DraftFolder(path, target=facts)
            _check_shape(folder.shape, plan.shape, path)
            return cls(path, folder)
        reader = CheckpointReader(find_checkpoint(path))
        check_megatron_tensors(reader.shape, reader.names(), str(reader.path))
        _check_shape(reader.shape, plan.shape, reader.path)
        return cls(reader.path, None)

    def load(self, draft: DSparkDraftModel, *, tp_group: dist.ProcessGroup) -> None:
        """Fill the draft's trained parameters; its embedding and LM head stay the target's. From a
        checkpoint collective over the world, from a folder each rank reads for itself."""
        if self.folder is None:
            load_checkpoint(self.path, draft, None)
        else:
            fill_draft(draft, self.folder.tensor, tp_group=tp_group)


def _check_shape(found: DraftShape, wanted: DraftShape, path: Path) -> None:
    there, here = found.to_dict(), wanted.to_dict()
    different = [
        f"{key} ({there[key]} there, {here[key]} here)"
        for key in here
        if key not in _FREE and there[key] != here[key]
    ]
    require(
        not different,
        f"train.initial_checkpoint {path} is of another draft: {', '.join(different)}; set the "
        "model section to its values, or start without it",
    )
