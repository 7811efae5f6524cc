"""A learnt logit of each query head that takes part in its softmax and has no value.

For kernels that give no log-sum-exp it is one more key. Each query gets more numbers, two of which
are its head's logit b; the sink's key has there what turns their product into b, and other keys
have zeros. So it is exact under any mask and for heads that share keys, and its gradient is
autograd's.

Shapes: a/tp query heads, g/tp key/value heads, d head width, D = d + WIDENED.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WIDENED = 8
"""Numbers more in a row. Kernels of GPUs want their count to be a multiple of this."""


def with_sink(query: Tensor, sink: Tensor) -> Tensor:
    """Queries [..., a/tp, d] with the logits [a/tp] -> [..., a/tp, D]."""
    columns = F.pad(sink.to(query.dtype)[:, None].expand(-1, 2), (0, WIDENED - 2))
    return torch.cat([query, columns.expand(*query.shape[:-1], -1)], dim=-1)


def widened(key_value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values [..., d] -> [..., D]."""
    key, value = (F.pad(rows, (0, WIDENED)) for rows in key_value)
    return key, value


def sink_kv(key_value: tuple[Tensor, Tensor], scale: float) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """The sink's own key and value, [1, g/tp, D] each, beside widened ones. What undoes the scale
    of scores is held to 16 bits, in bf16 too: by its first 8 bits and the rest."""
    like = key_value[0]
    width = like.shape[-1] - WIDENED
    key, value = (like.new_zeros(1, *like.shape[-2:]) for _ in range(2))
    fraction, exponent = math.frexp(1 / scale)
    first = math.ldexp(round(math.ldexp(fraction, 8)), exponent - 8)
    key[..., width], key[..., width + 1] = first, 1 / scale - first
    return (key,), (value,)


def scaled_by_sink(out: Tensor, log_sum_exp: Tensor, sink: Tensor) -> Tensor:
    """Where a kernel gives the log-sum-exp of its scores, the sink is a factor of the output.
    out [1, a/tp, q, d], log_sum_exp [1, a/tp, q], sink [a/tp] -> [1, a/tp, q, d]."""
    share = torch.sigmoid(log_sum_exp - sink.float()[:, None])
    return (out * share[..., None]).to(out.dtype)
