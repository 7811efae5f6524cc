"""Writes a draft as a folder of some layout: config, safetensors, model card, sidecar.

One safetensors file is in memory at a time. The folder appears whole or not at all; the same draft
always gives the same bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.conversion.draft_folder import read_config
from dspark_megatron.conversion.engines.verdicts import engine_verdicts
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.names import (
    EMBEDDING,
    LM_HEAD,
    hugging_face_shapes,
    raise_if_any,
)
from dspark_megatron.conversion.layouts.table import LAYOUTS, config_of_draft, detect_layout
from dspark_megatron.conversion.model_card import check_name, is_unedited, model_card
from dspark_megatron.conversion.sidecar import (
    SIDECAR,
    carry_sidecar,
    check_sidecar,
    is_of_same_draft,
)
from dspark_megatron.conversion.sources import DraftSource
from dspark_megatron.conversion.target_match import not_finite, shape_problems, target_problems
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.checkpoints.named import NamedCheckpoint
from dspark_megatron.storage.new_folder import new_folder
from dspark_megatron.storage.safetensors_folder import (
    INDEX,
    SafetensorsFolder,
    plan_files,
    write_tensor_files,
)
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.storage.target_weights import SharedMatrix, shared_matrices
from dspark_megatron.storage.writing import write_json, write_text

WRITTEN = {"config.json", INDEX, "README.md", SIDECAR}
"""Files of an export, beside the safetensors."""


@dataclass(frozen=True)
class WriteOptions:
    layout: str = "hf"
    dtype: torch.dtype | None = torch.bfloat16
    """None: the type that holds every tensor of the source without loss."""
    max_shard_size: int | str = "5GB"
    shared_weights: bool = True
    """Include the target's embedding and LM head where they belong to the layout."""
    force: bool = False
    """Replace an earlier export of other weights or settings."""
    target_name: str | None = None
    """The target as users find it, such as a hub id; None: its folder's name."""
    target_checkpoint: str | Path = ""
    """A Megatron-LM checkpoint with the target's weights, where its folder has none."""


def write_draft_folder(
    source: DraftSource, target_dir: Path, output_dir: Path, options: WriteOptions
) -> Path:
    """Write and return output_dir. Raises ConfigError before anything is written when the result
    could not be used, and leaves nothing behind when writing fails."""
    output_dir = output_dir.resolve()
    layout, shape = LAYOUTS[options.layout], source.description.shape
    target_config = load_target_config(target_dir)
    problems = shape_problems(shape) + target_problems(shape, target_config)
    raise_if_any(problems, f"the draft of {source.path}")
    shared = {}
    if layout.shared_weights and options.shared_weights:
        shared = _shared_matrices(shape, target_dir, options.target_checkpoint)
    dtype = options.dtype or source.dtype()
    facts = TargetFacts.of(target_config, options.target_name or target_dir.resolve().name)
    check_name("the target (--target-name)", facts.name)
    config = config_of_draft(
        layout, source.description, target_config=target_config, facts=facts, dtype=dtype
    )
    history = source.history()
    # Iteration 0 is an import, whose sidecar came with it.
    iteration = history.get("iterations") or None
    checkpoint = NamedCheckpoint.at(source.path, history["weights"]) if iteration else None
    with_temperatures = check_sidecar(
        source.neighbours(), shape.num_draft_tokens, iteration, checkpoint
    )
    names = hugging_face_shapes(shape, shared_weights=bool(shared))
    sizes = {layout.to_name(name): size for name, size in names.items()}
    shapes = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
    plan = plan_files(shapes, options.max_shard_size)

    def converted(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
        name, tensor = item
        return layout.to_name(name), _cast(name, tensor, dtype)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return map(converted, _tensors(source, shared))  # a loop would keep the last one

    if _holds_earlier_export(output_dir) and not options.force:
        require(
            _is_same(output_dir, config, plan.tensor_to_filename, tensors()),
            f"{output_dir} holds an earlier export, of other weights or settings; give --force to "
            "replace it",
        )
    _check_nothing_lost(output_dir, source.neighbours())
    with new_folder(output_dir) as folder:
        write_json(folder / "config.json", config)
        verdicts = engine_verdicts(config, sizes, target_config=target_config)
        card = model_card(
            source.description,
            layout=layout.name,
            target=facts.name,
            folder=output_dir.name,
            engines={verdict.engine for verdict in verdicts if verdict.loads},
            history=history,
            with_temperatures=with_temperatures,
        )
        write_text(folder / "README.md", card)
        carry_sidecar(source.neighbours(), folder)
        write_tensor_files(folder, tensors(), plan)
    return output_dir


def _tensors(source: DraftSource, shared: dict[str, SharedMatrix]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the order of `hugging_face_shapes`. shared: the target's embedding and LM
    head, or nothing."""
    if shared:
        yield EMBEDDING, shared[EMBEDDING].tensor()
    yield from source.tensors()
    if shared:
        yield LM_HEAD, shared[LM_HEAD].tensor()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    problems = not_finite(name, cast)
    require(
        not problems,
        f"{''.join(problems)} as {str(dtype).removeprefix('torch.')}; the source has "
        f"{int((~tensor.isfinite()).sum())}; choose a type that holds them, or another checkpoint",
    )
    return cast


def _shared_matrices(
    shape: DraftShape, target_dir: Path, target_checkpoint: str | Path
) -> dict[str, SharedMatrix]:
    matrices = shared_matrices(target_dir, target_checkpoint)
    wanted = (shape.vocab_size, shape.hidden_size)
    problems = [
        f"{matrix.name} must have shape {list(wanted)}, has {list(matrix.shape)}"
        for matrix in matrices
        if matrix.shape != wanted
    ]
    raise_if_any(problems, str(target_checkpoint or target_dir))
    return dict(zip((EMBEDDING, LM_HEAD), matrices, strict=True))


def _holds_earlier_export(output_dir: Path) -> bool:
    """False where it is empty. ConfigError where it holds anything but what an export writes."""
    try:
        names = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    except OSError as error:
        raise ConfigError(f"cannot write to {output_dir}: {error.strerror}") from error
    if not names:
        return False
    foreign = names - WRITTEN - {path.name for path in output_dir.glob("model*.safetensors")}
    require(
        not foreign and _holds_draft(output_dir),
        f"{output_dir} is not empty and no earlier export alone (also there: "
        f"{', '.join(sorted(foreign)) or 'the config of no draft'}); choose another folder",
    )
    return True


def _is_same(
    folder: Path,
    config: dict[str, Any],
    files: dict[str, str],
    tensors: Iterable[tuple[str, Tensor]],
) -> bool:
    """Whether an earlier export has this config and these tensors in these files, so that nothing
    is lost when it is written again."""
    places = {name: folder / file for name, file in files.items()}
    try:
        there = SafetensorsFolder(folder)
        return (
            read_config(folder) == config
            and there.files == places
            and all(
                (found := there.tensor(name)).dtype == tensor.dtype and torch.equal(found, tensor)
                for name, tensor in tensors
            )
        )
    except ConfigError:  # damaged: what it was is not known
        return False


def _check_nothing_lost(output_dir: Path, neighbours: Path) -> None:
    """Replacing an earlier export must not delete what was made in it."""
    own, carried = output_dir / SIDECAR, neighbours / SIDECAR
    card = output_dir / "README.md"
    lost = []
    if own.is_file() and not (carried.is_file() and is_of_same_draft(own, carried)):
        lost.append(f"{SIDECAR}, which is not that of {neighbours}")
    if card.is_file() and not is_unedited(card.read_text(encoding="utf-8", errors="replace")):
        lost.append(f"{card.name}, which was edited")
    require(
        not lost,
        f"replacing {output_dir} would delete its {' and '.join(lost)}; move that away first",
    )


def _holds_draft(folder: Path) -> bool:
    """Whether the config is a draft's, and not, say, the target's."""
    try:
        detect_layout(read_config(folder), ())
    except ConfigError:
        return False
    return True
