"""Load this rank's part of the target's base model, and refuse one that is incomplete."""

import torch
import transformers
from transformers import AutoModel, PreTrainedModel

from dspark_megatron.config import TargetConfig
from dspark_megatron.errors import require
from dspark_megatron.targets.huggingface.split import TargetSplit


def load_base_model(config: TargetConfig, split: TargetSplit) -> PreTrainedModel:
    """Transformers only warns of weights that it does not find or cannot cut, and leaves them
    random; here that is an error."""
    model, found = AutoModel.from_pretrained(
        config.path,
        dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        attn_implementation=config.attention,
        local_files_only=True,
        trust_remote_code=False,
        distributed_config=split.distributed_config(),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    _require_none(config.path, "lacks", found["missing_keys"])
    misfits = [entry[0] for entry in found["mismatched_keys"]]
    way_out = "; load it with fewer ways of splitting (parallel.*, target.shard_*)"
    _require_none(
        config.path, "has in another shape than this split of the model", misfits, way_out
    )
    return model


def _require_none(path: str, what: str, names: set[str] | list[str], way_out: str = "") -> None:
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    require(
        not names,
        f"the target's folder {path} {what} {len(names)} of the weights that Transformers "
        f"{transformers.__version__} expects ({shown}){way_out}",
    )
