"""What kernels of a GPU take where the meta device would show plain mathematics instead.

- FlexAttention and SDPA keep queries, keys, values, the output and a log-sum-exp for each query;
  no scores. FlexAttention goes through the tiles of its mask that are not empty.
- The compiled passes of the head loss hold two fp32 copies of a chunk's logits (measured on an
  H200), read the logits once a pass and write what they change. The passes of a soft cap go number
  by number and hold none.
- AdamW is one kernel without temporary tensors.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from dspark_megatron.config.attention import FULL, LayerAttention
from dspark_megatron.mcore import loadable_adam
from dspark_megatron.ops import logit_terms
from dspark_megatron.ops.attention import block_attention, flex
from dspark_megatron.ops.attention.flex import FlexBlockAttention
from dspark_megatron.ops.transfer import ContextRanges
from dspark_megatron.planning.observing.observer import Observer

aten = torch.ops.aten
FUSED = 2
"""p and q of a whole chunk."""
_BY_NUMBER = ("cap", "pull_back")
_WRITING = ("gradient", "all_passes", *_BY_NUMBER)


@contextlib.contextmanager
def gpu_kernels(observer: Observer) -> Iterator[None]:
    """Within it, what a GPU would run as one kernel is observed as that kernel."""

    class Flex(_FlexOnPaper):
        watched = observer

    replaced = (
        (block_attention, "FlexBlockAttention", Flex),
        (F, "scaled_dot_product_attention", _attention(observer)),
        (logit_terms, "compiled", _fused(observer)),
        (loadable_adam, "adamw", _adamw(observer)),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, ours in replaced:
            stack.enter_context(mock.patch.object(owner, name, ours))
        yield


class _FlexOnPaper(FlexBlockAttention):
    """The tiles of its mask are counted on the host, where the ranges are known."""

    watched: Observer

    def __init__(
        self,
        context_ranges: ContextRanges,
        slots: int,
        context_length: int,
        rule: LayerAttention = FULL,
    ) -> None:
        super().__init__(context_ranges, slots, context_length, rule)
        self.share = 0.0
        if context_ranges.on_host:
            # Not for the modes of a plan, which would have it on meta.
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                context = torch.tensor(context_ranges.on_host)
                some, _ = flex._tiles(context, slots, context_length, rule)
                self.share = some.double().mean().item()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        return self.attend_with_sum(query, key, value)[0]

    def attend_with_sum(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return _FlexKernel.apply(query, key, value, self.share, self.watched)


class _FlexKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, share: float, watched: Observer
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(query)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.share, ctx.watched = share, watched
        flops = sdpa_flop_count(query.shape, *_for_each_head(query, key, value))
        watched.add(int(share * flops), _bytes(query, key, value, out, log_sum_exp))
        return out, log_sum_exp

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum_exp = ctx.saved_tensors
        delta = torch.empty_like(log_sum_exp)
        grads = [torch.empty_like(x) for x in (query, key, value)]
        keys = _for_each_head(query, key, value)
        flops = sdpa_backward_flop_count(grad.shape, query.shape, *keys)
        read = (query, key, value, out, log_sum_exp, grad, delta)
        ctx.watched.add(int(ctx.share * flops), _bytes(*read, *grads))
        return *grads, None, None


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> list[torch.Size]:
    """Shapes of keys and values if each query head had its own."""
    return [torch.Size((x.shape[0], query.shape[1], *x.shape[2:])) for x in (key, value)]


def _attention(observer: Observer) -> Callable[..., Tensor]:
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As a flash kernel, or with a mask (or in fp32) as the memory-efficient one, which takes
        it as a number for each pair and needs keys of every head. Tiles that a causal mask hides
        are left out."""
        if attn_mask is None and query.dtype.itemsize == 2 and query.shape[-1] == value.shape[-1]:
            out = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        else:
            if enable_gqa and key.shape[1] != query.shape[1]:
                share = query.shape[1] // key.shape[1]
                key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
            bias = None if attn_mask is None else _as_numbers(attn_mask, query, key)
            out = aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
            )[0]
        if is_causal and query.shape[-2] == key.shape[-2]:
            observer.add(-sdpa_flop_count(query.shape, key.shape, value.shape) // 2)
        return out

    return attend


def _as_numbers(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype)
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


def _fused(observer: Observer) -> Callable[[Callable], Callable]:
    def compiled(function: Callable) -> Callable:
        def run(*args: Any) -> Any:
            logits = [x for x in args[:2] if isinstance(x, Tensor)]
            copies = 0 if function.__name__ in _BY_NUMBER else FUSED
            kept = [torch.empty_like(logits[0], dtype=torch.float32) for _ in range(copies)]
            with _disable_current_modes(), torch.no_grad():
                out = function(*args)
            observer.follow([] if out is None else [out])
            written = logits[:1] if function.__name__ in _WRITING else []
            observer.add(0, _bytes(*logits, *written, *kept, *kept))
            return out

        return run

    return compiled


def _adamw(observer: Observer) -> Callable[..., None]:
    def adamw(parameters: list[Tensor], gradients: list[Tensor], *moments: Any, **_: Any) -> None:
        """Reads gradients; reads and writes weights and both moments."""
        observer.add(0, _bytes(*gradients) + 6 * _bytes(*parameters))

    return adamw


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
