"""Start-up check: a text in pieces, with drafts taken back, has the states of the whole text."""

import torch
from torch import Tensor

from dspark_megatron.config import require
from dspark_megatron.targets.base import Target
from dspark_megatron.targets.packing_check import mean_distance, rounding_of

_TOKENS = 48
_PIECES = ((0, 16, 0), (16, 17, 4), (17, 24, 2), (24, 25, 0), (25, 48, 1))
"""First token, end, and drafts that are rejected after it."""


@torch.no_grad()
def check_cache(target: Target, input_ids: Tensor) -> None:
    """Compare last hidden states [1, s, h] of a prompt, taken in as decoding does, with those of
    one pass. input_ids [1, s >= 1], alike on every tensor-parallel rank. Costs six short passes.
    Raises ConfigError when they differ by more than rounding."""
    ids = input_ids.repeat(1, -(-_TOKENS // input_ids.shape[1]))[:, :_TOKENS].to(target.device)
    cache, found = target.new_cache(), []
    for start, end, drafts in _PIECES:
        own = ids[:, start:end]
        if start == 0:
            found.append(target.add_sequence(own, cache).last_hidden)
            continue
        tokens = torch.cat([own, ids[:, :drafts]], dim=1)
        found.append(target.extend(tokens, cache).last_hidden[:, : end - start])
        target.forget(cache, [drafts])
    whole = target.states(ids).last_hidden
    difference = mean_distance(torch.cat(found, dim=1)[0].float(), whole[0].float())
    most = rounding_of(target.dtype)
    require(
        difference <= most,
        "decoding with this target would not be lossless: states of a text that comes in pieces, "
        f"with drafts taken back, differ by {difference:.2g} of their norm from those of the whole "
        f"text (at most {most:g} may be rounding). Its family does not go on from its cache as "
        "it should in this version of Transformers: take another version, or evaluate in a "
        "serving engine",
    )
