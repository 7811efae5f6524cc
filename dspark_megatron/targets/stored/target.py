"""Provider `cache`: states that were made before, found by the content of a sample."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.transfer import to_device
from dspark_megatron.targets.base import StatesSource, TargetStates
from dspark_megatron.targets.stored.kept_states import KeptStates
from dspark_megatron.targets.stored.layout import StatesReader

_AHEAD = 2
"""Micro-batches read before they are asked for, at most; they lie in memory."""


class StoredStates(StatesSource):
    """States of the samples of a data set. What was not kept of them is NaN: nothing may read it,
    and a mistake would show."""

    lockstep = False

    def __init__(
        self,
        cache: StatesReader,
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
        self._reader = ThreadPoolExecutor(1, "cache-reader")
        self._expected: deque[tuple[tuple[int, ...], int]] = deque()
        self._ahead: deque[tuple[tuple[int, ...], Future[TargetStates]]] = deque()

    def expect(self, batches: Sequence[Tensor], *, samples: Sequence[Sequence[int]] = ()) -> None:
        self._ahead.clear()
        sizes = (input_ids.shape[1] for input_ids in batches)
        self._expected = deque(zip(map(tuple, samples), sizes, strict=True))
        self._read_ahead()

    def states(self, input_ids: Tensor, *, samples: Sequence[int] = (), **_: Any) -> TargetStates:
        """Taps are padded to the longest context only, c of them: [b, c, m*h]."""
        wanted = tuple(samples)
        while self._ahead and self._ahead[0][0] != wanted:
            self._ahead.popleft()  # what teaches nothing is not asked for
        if self._ahead:
            found = self._ahead.popleft()[1].result()
        else:
            found = self._read(wanted, input_ids.shape[1])
        self._read_ahead()
        last_hidden = found.last_hidden
        return TargetStates(
            to_device(found.taps, self._device),
            None if last_hidden is None else to_device(last_hidden, self._device),
        )

    def _read_ahead(self) -> None:
        """Have the thread read what comes next, while the device works on what is there."""
        while self._expected and len(self._ahead) < _AHEAD:
            samples, seq_length = self._expected.popleft()
            future = self._reader.submit(self._read, samples, seq_length)
            self._ahead.append((samples, future))

    def _read(self, samples: tuple[int, ...], seq_length: int) -> TargetStates:
        parts = [self._cache.rows(self._places[i]) for i in samples]
        taps = pad_sequence([part.taps for part in parts], True, torch.nan)
        with_last_hidden = parts[0].last_hidden is not None
        return TargetStates(taps, _spread(parts, seq_length) if with_last_hidden else None)


def _spread(parts: list[KeptStates], seq_length: int) -> Tensor:
    """Last hidden states at their positions: [b, s, h]."""
    width = parts[0].last_hidden.shape[-1]
    spread = parts[0].last_hidden.new_full((len(parts), seq_length, width), torch.nan)
    for row, part in zip(spread, parts, strict=True):
        row[part.positions] = part.last_hidden
    return spread
