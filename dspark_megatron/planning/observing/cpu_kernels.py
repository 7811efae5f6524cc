"""What kernels of a CPU take where the meta device would show something else: for plans that are
compared with runs on CPUs."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_megatron.ops import chunk_budget
from dspark_megatron.planning.observing.observer import Observer

tile_rows = chunk_budget.tile_rows
plain_attention = F.scaled_dot_product_attention


@contextlib.contextmanager
def cpu_kernels(observer: Observer) -> Iterator[None]:
    """Attention is the CPU's flash kernel, and elementwise passes take tiles that fit its cache."""

    def tiles_of_a_cpu(columns: int, device: torch.device) -> int:
        return tile_rows(columns, torch.device("cpu"))

    with (
        mock.patch.object(F, "scaled_dot_product_attention", _attend),
        mock.patch.object(chunk_budget, "tile_rows", tiles_of_a_cpu),
    ):
        yield


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.shape[-1] != value.shape[-1]:  # no kernel has this
        return plain_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
    mask = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=query.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
