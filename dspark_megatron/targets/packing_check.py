"""Start-up check: the target's family keeps the samples of a packed row apart."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dspark_megatron.config import require
from dspark_megatron.targets.base import TargetStates
from dspark_megatron.targets.huggingface import HuggingFaceTarget
from dspark_megatron.targets.packing import PackedRows

_TOKENS = 512
"""Of a sample, at most: a row of them and its mask stay small."""


@torch.no_grad()
def check_packing(target: HuggingFaceTarget, samples: Sequence[Tensor]) -> None:
    """Compare the states of packed samples [s] with those of each alone; every rank calls it with
    the same ones. At least two, of which the first two share a row; the others have one, beside it
    where attention takes a mask. A window of attention that is longer than they are is not seen.

    Raises ConfigError when they differ by more than rounding.
    """
    most = min(_TOKENS, (target.row_planner.max_tokens or len(samples) * _TOKENS) // len(samples))
    ids = [sample[: max(1, most)] for sample in samples]
    lengths = [len(sample) for sample in ids]
    packed = target.packed_states(pad_sequence(ids, batch_first=True), lengths, _rows(target, ids))
    differences = [
        mean_distance(_whole(packed)[i, :length], _whole(target.states(ids[i][None]))[0])
        for i, length in enumerate(lengths)
    ]
    tolerance = rounding_of(target.model.dtype)
    require(
        max(differences) <= tolerance,
        f"the target's family ({target.model.config.model_type}) does not keep samples of a packed "
        f"row apart with target.attention {target.model.config._attn_implementation!r}: states of "
        f"sample {differences.index(max(differences))} of the row differ by {max(differences):.2g} "
        f"of their norm from those of the sample alone (at most {tolerance:g} may be rounding); "
        "set target.packing=false, and data.group_by_length=true for less padding",
    )


def _rows(target: HuggingFaceTarget, ids: list[Tensor]) -> list[PackedRows]:
    rows = [[0, 1], list(range(2, len(ids)))] if len(ids) > 2 else [[0, 1]]
    groups = [rows] if target.row_planner.has_masks else [[row] for row in rows]
    return [
        PackedRows(group, max(sum(len(ids[i]) for i in row) for row in group)) for group in groups
    ]


def _whole(states: TargetStates) -> Tensor:
    """Taps and last hidden state side by side."""
    parts = [states.taps] if states.last_hidden is None else [states.taps, states.last_hidden]
    return torch.cat(parts, dim=-1).float()


def rounding_of(dtype: torch.dtype) -> float:
    """The most that `mean_distance` may be. A sum in another order moves fp32 by 1e-6, bf16 by some
    1e-2; a mistake, most tokens by far more."""
    return 1e-3 if dtype == torch.float32 else 0.05


def mean_distance(packed: Tensor, alone: Tensor) -> float:
    """Mean over tokens of the distance in units of the norm, NaN as infinite. Not of the whole: the
    states of a first token may be a thousand times larger than the others'. Both [s, x]."""
    mean = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).mean().item()
    return mean if mean == mean else float("inf")
