"""Provider `cache`: states that were made before, found by the content of a sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dspark_megatron.config import ConfigError
from dspark_megatron.targets.base import StatesSource, TargetStates
from dspark_megatron.targets.cache_files import CacheReader
from dspark_megatron.targets.state_rows import StateRows


class CachedTarget(StatesSource):
    """States of the samples of a data set. What was not kept of them is NaN: nothing may read it,
    and a mistake would show."""

    lockstep = False

    def __init__(
        self,
        cache: CacheReader,
        data: Sequence[Any],
        *,
        device: torch.device,
        hints: Sequence[str] = (),
    ) -> None:
        """data: samples (`input_ids`, `loss_mask`), all of which the cache must have; it may have
        others. hints: how the data differ from those that the cache was made of."""
        self._cache, self._device = cache, device
        places = {key: place for place, key in enumerate(cache.keys())}
        samples = (data[i] for i in range(len(data)))
        found = [places.get(cache.key(one.input_ids, one.loss_mask)) for one in samples]
        missing = [i for i, place in enumerate(found) if place is None]
        if missing:
            raise ConfigError(
                f"the cache {cache.path} must hold every sample of data.train_files, and lacks "
                f"{len(missing):,} of {len(found):,} (the first is sample {missing[0]}, from 0): "
                f"{'; '.join(hints) or 'other tokens or loss masks'}. Write a cache of these "
                "data, or set target.provider=huggingface"
            )
        self._places = found

    def states(
        self,
        input_ids: Tensor,
        *,
        lengths: list[int] | None = None,
        samples: Sequence[int] = (),
    ) -> TargetStates:
        """Taps are padded to the longest context only, c of them: [b, c, m*h]."""
        parts = [self._cache.rows(self._places[i]) for i in samples]
        taps = pad_sequence([part.taps for part in parts], True, torch.nan)
        last_hidden = None
        if parts[0].last_hidden is not None:
            last_hidden = _spread(parts, input_ids.shape[1]).to(self._device)
        return TargetStates(taps.to(self._device), last_hidden)


def _spread(parts: list[StateRows], seq_length: int) -> Tensor:
    """Last hidden states at their positions: [b, s, h]."""
    width = parts[0].last_hidden.shape[-1]
    spread = parts[0].last_hidden.new_full((len(parts), seq_length, width), torch.nan)
    for row, part in zip(spread, parts, strict=True):
        row[part.positions] = part.last_hidden
    return spread
