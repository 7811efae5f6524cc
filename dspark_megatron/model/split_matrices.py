"""The matrices that Muon orthogonalizes: those of an export that map hidden states to others. Not
the ones with a row for every vocabulary entry, nor the confidence head's single row."""

from megatron.core.transformer.module import MegatronModule

from dspark_megatron.mcore.split_matrix import SplitMatrix
from dspark_megatron.model.transformer_config import DraftTransformerConfig


def split_matrices(model: MegatronModule, config: DraftTransformerConfig) -> dict[str, SplitMatrix]:
    """By name of the parameter, in the order of the model."""
    gate_and_up = SplitMatrix(0, matrices=2, groups=config.tensor_model_parallel_size)
    key_and_value = SplitMatrix(0, matrices=2, groups=config.num_query_groups)
    kinds = {
        "fc": SplitMatrix(0),
        "linear_q": SplitMatrix(0),
        "linear_kv": SplitMatrix(0) if config.shared_key_value else key_and_value,
        "linear_proj": SplitMatrix(1),
        "linear_fc1": gate_and_up,
        "linear_fc2": SplitMatrix(1),
        "gate_proj": SplitMatrix(None),
        "joint_proj": SplitMatrix(None),
    }
    found = {}
    for name, parameter in model.named_parameters():
        *_, module, kind = name.split(".")
        if kind == "weight" and module in kinds and parameter.requires_grad:
            found[name] = kinds[module]
    return found
