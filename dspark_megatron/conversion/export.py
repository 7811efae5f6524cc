"""A training checkpoint as a Hugging Face folder that DeepSpec and the serving engines load.

One tensor at a time is read, cast and put into the current shard; the same checkpoint always gives
the same bytes. The folder appears whole, by a rename, or not at all.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.config import ConfigError, require
from dspark_megatron.conversion.hf_config import hugging_face_config
from dspark_megatron.conversion.megatron_checkpoint import CheckpointReader, find_checkpoint
from dspark_megatron.conversion.names import (
    EMBEDDING,
    LM_HEAD,
    check_megatron_tensors,
    hugging_face_shapes,
    raise_if_any,
    to_hugging_face,
)
from dspark_megatron.conversion.safetensors_writer import parse_size, write_safetensors
from dspark_megatron.shape import DraftShape
from dspark_megatron.target_folder import (
    load_target_config,
    read_tensor,
    tensor_shapes,
)
from dspark_megatron.target_folder import shared_weights as shared_weight_names

logger = logging.getLogger(__name__)

Fingerprint = Callable[[Path], str]


def export_checkpoint(
    checkpoint: str | Path,
    target_dir: str | Path,
    output_dir: str | Path,
    iteration: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
    shared_weights: bool = True,
    fingerprint: Fingerprint | None = None,
) -> Path:
    """Write `config.json` and safetensors to output_dir and return it.

    checkpoint: a run, checkpoints or `iter_*` folder. shared_weights: include the target's
    embedding and LM head, which DeepSpec needs and serving engines take from the target.
    fingerprint: how training fingerprinted the target; None skips that comparison. Raises
    ConfigError before anything is written when the export could not be used; logs a warning when
    only some engines could use it.
    """
    reader = CheckpointReader(find_checkpoint(checkpoint, iteration))
    target_dir, output_dir = Path(target_dir), Path(output_dir).resolve()
    target_config = load_target_config(target_dir)
    shard_limit = parse_size(max_shard_size)
    problems = shape_problems(reader.shape) + target_problems(reader.shape, target_config)
    raise_if_any(problems, f"the draft of {reader.path}")
    check_megatron_tensors(reader.shape, reader.names(), str(reader.path))
    _check_fingerprint(reader, target_dir, fingerprint)
    shared = _shared_names(reader.shape, target_dir) if shared_weights else {}
    config = hugging_face_config(
        reader.shape,
        num_anchors=reader.meta["num_anchors"],
        initializer_range=reader.meta["initializer_range"],
        confidence_head_alpha=reader.meta["confidence_head_alpha"],
        target_config=target_config,
        dtype=dtype,
    )
    _check_output(output_dir, config)
    for warning in export_warnings(reader.shape, output_dir):
        logger.warning(warning)
    partial = _partial(output_dir)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sizes = {
        name: math.prod(size) * dtype.itemsize
        for name, size in hugging_face_shapes(reader.shape, shared_weights).items()
    }
    tensors = exported_tensors(reader, target_dir, shared)
    write_safetensors(partial, ((n, t.to(dtype)) for n, t in tensors), sizes, shard_limit)
    _put_in_place(partial, output_dir)
    return output_dir


def exported_tensors(
    reader: CheckpointReader, target_dir: Path, shared: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the order of `hugging_face_shapes`, in the type it is stored in. shared:
    names in the target of the embedding and the LM head, or nothing."""
    if shared:
        yield EMBEDDING, read_tensor(target_dir, shared[EMBEDDING])
    yield from to_hugging_face(reader.shape, reader.tensor)
    if shared:
        yield LM_HEAD, read_tensor(target_dir, shared[LM_HEAD])


def shape_problems(shape: DraftShape) -> list[str]:
    """What makes a draft unusable with every engine."""
    ids, last = list(shape.target_layer_ids), shape.num_target_layers - 2
    problems = []
    if not ids or sorted(set(ids)) != ids or ids[0] < 0 or ids[-1] > last:
        problems.append(
            f"target_layer_ids {ids} must be strictly increasing and in [0, {last}]: engines "
            "sort them and cannot capture the output of the last layer"
        )
    if not 0 <= shape.mask_token_id < shape.vocab_size:
        problems.append(f"mask_token_id ({shape.mask_token_id}) must be in [0, {shape.vocab_size})")
    return problems


def target_problems(shape: DraftShape, target_config: Any) -> list[str]:
    """What makes a draft unusable with this target."""
    text = target_config.get_text_config()
    pairs = {
        "vocab_size": (shape.vocab_size, text.vocab_size),
        "hidden_size": (shape.hidden_size, text.hidden_size),
        "num_target_layers": (shape.num_target_layers, text.num_hidden_layers),
    }
    return [
        f"{name} ({ours}) must be the target's ({theirs}); give the target it was trained for"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


def export_warnings(shape: DraftShape, output_dir: Path) -> list[str]:
    """What keeps some engines from using an export."""
    found = []
    if shape.markov_head_type != "vanilla":
        found.append(
            f"a {shape.markov_head_type} Markov head: vLLM and mlx-dspark cannot load it; "
            "SGLang, TensorRT-LLM and DeepSpec can"
        )
    if shape.markov_rank == 0:
        found.append("no Markov head (markov_rank 0): SGLang rejects it")
    traps = [word for word in ("dflash", "eagle") if word in str(output_dir).lower()]
    if traps:
        found.append(
            f"the path {output_dir} contains {traps}: vLLM guesses the method from the path; "
            'move the folder or pass "method":"dspark"'
        )
    return found


def _check_fingerprint(
    reader: CheckpointReader, target_dir: Path, fingerprint: Fingerprint | None
) -> None:
    if fingerprint is None:
        return
    found, wanted = fingerprint(target_dir), reader.meta["target_fingerprint"]
    require(
        found == wanted,
        f"{target_dir} has fingerprint {found[:12]}, the draft was trained for {wanted[:12]}; "
        "give the target's folder as it was in training (same weights, same type)",
    )


def _shared_names(shape: DraftShape, target_dir: Path) -> dict[str, str]:
    names = dict(zip((EMBEDDING, LM_HEAD), shared_weight_names(target_dir), strict=True))
    shapes, wanted = tensor_shapes(target_dir), (shape.vocab_size, shape.hidden_size)
    problems = [
        f"{name} must have shape {list(wanted)}, has {list(shapes[name])}"
        for name in names.values()
        if shapes[name] != wanted
    ]
    raise_if_any(problems, str(target_dir))
    return names


def _check_output(output_dir: Path, config: dict[str, Any]) -> None:
    """Only a folder that holds nothing but an earlier export of ours may be replaced: our files,
    and a config with our keys (DeepSpec's own folders have others)."""
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
        probe = output_dir.with_name(f"{output_dir.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to {output_dir}: {error.strerror}") from error
    ours = {path.name for path in output_dir.glob("model*.safetensors")}
    foreign = names - ours - {"config.json", "model.safetensors.index.json"}
    require(
        not names or (not foreign and _keys(output_dir) == config.keys()),
        f"{output_dir} exists and is not an earlier export alone (also there: "
        f"{', '.join(sorted(foreign)) or 'a config of another tool'}); delete it or choose another",
    )


def _keys(output_dir: Path) -> set[str]:
    try:
        return set(json.loads((output_dir / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()


def _partial(output_dir: Path) -> Path:
    return output_dir.with_name(f"{output_dir.name}.partial")


def _put_in_place(partial: Path, output_dir: Path) -> None:
    replaced = output_dir.with_name(f"{output_dir.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output_dir.exists():
        output_dir.rename(replaced)
    partial.rename(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
