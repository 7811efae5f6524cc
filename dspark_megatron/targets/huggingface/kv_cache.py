"""Keys and values of several sequences of unequal length, in one of Transformers' caches.

Shorter sequences are padded on the left, as in Transformers' own batched generation: then the
distance of two columns is the distance of two tokens, which is what its masks of sliding windows
count, and whatever was rejected stands at the right end.

States of recurrent layers cannot be cut. There what the cache was before the last tokens is kept,
and those of them that stay are run again.

Shapes: b sequences, w columns (the longest sequence), q new tokens, g key/value heads, d width.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dspark_megatron.errors import ConfigError
from dspark_megatron.targets.family import keeps_states


class SequenceCache:
    """A cache whose sequences are taken in, cut and dropped one by one."""

    def __init__(self, config: Any) -> None:
        """config: of the target."""
        self._config = config
        self._cache = _empty_cache(config)
        self._is_recurrent = keeps_states(config)
        self._before: tuple[DynamicCache, Tensor] | None = None
        """Of recurrent layers: the cache before the tokens that came last, and these."""
        self.lengths: list[int] = []
        """Tokens of each sequence that count."""

    def arguments(self, tokens: int, device: torch.device) -> dict[str, Any]:
        """What a forward pass of `tokens` more tokens of every sequence takes beside them."""
        arguments = {"use_cache": True, "past_key_values": self._cache}
        lengths = torch.tensor(self.lengths, device=device)[:, None]  # [b, 1]
        width = max(self.lengths)
        if min(self.lengths) < width:
            columns = torch.arange(width + tokens, device=device)
            arguments["attention_mask"] = (columns >= width - lengths).long()  # [b, w + q]
            arguments["position_ids"] = lengths + torch.arange(tokens, device=device)  # [b, q]
        return arguments

    def remember(self, input_ids: Tensor) -> None:
        """Called before the forward pass of the next tokens [b, q]."""
        if self._is_recurrent:
            self._before = _copied(self._cache), input_ids

    def extended(self, tokens: int) -> None:
        """The forward pass has taken in `tokens` more tokens of every sequence."""
        self.lengths = [length + tokens for length in self.lengths]

    def add(self, other: "SequenceCache") -> None:
        """Put the sequences of another cache after the own ones; the other is used up."""
        if not self.lengths:
            self._cache, self.lengths = other._cache, other.lengths
            return
        _require_movable(self._cache)
        self.lengths = self.lengths + other.lengths
        for own, new in zip(self._cache.layers, other._cache.layers, strict=True):
            own.keys = _stacked(own.keys, new.keys)
            own.values = _stacked(own.values, new.values)

    def forget(self, tokens: list[int]) -> Tensor | None:
        """Drop the last `tokens` (>= 0) tokens of each sequence. Returns what must then be run
        again [1, q]: of recurrent layers, the tokens of the last pass that stay."""
        if self._is_recurrent:
            return self._restored(tokens)
        width = max(self.lengths)
        self.lengths = [length - n for length, n in zip(self.lengths, tokens, strict=True)]
        if len(set(tokens)) == 1 and max(self.lengths) == width - tokens[0]:
            self._cache.crop(-tokens[0])
            return None
        _require_movable(self._cache)
        self._take_columns(width - torch.tensor(tokens))
        return None

    def _restored(self, tokens: list[int]) -> Tensor | None:
        assert self._before is not None
        (dropped,), (cache, input_ids) = tokens, self._before
        self._before = None
        count = input_ids.shape[1]
        if dropped == 0:
            return None
        self._cache, self.lengths = cache, [self.lengths[0] - count]
        return input_ids[:, : count - dropped] if dropped < count else None

    def keep(self, sequences: list[int]) -> None:
        """Drop all sequences but these, in this order."""
        if sequences == list(range(len(self.lengths))):
            return
        if not sequences:
            self._cache, self.lengths = _empty_cache(self._config), []
            return
        _require_movable(self._cache)
        width = max(self.lengths)
        self.lengths = [self.lengths[i] for i in sequences]
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.batch_select_indices(torch.tensor(sequences, device=layer.keys.device))
        self._take_columns(torch.full((len(sequences),), width))

    def _take_columns(self, ends: Tensor) -> None:
        """Make the columns before ends [b] of each sequence the last ones, of as many as the
        longest needs; what comes before a shorter one does not count."""
        columns = torch.arange(-max(self.lengths), 0) + ends[:, None]  # [b, w]
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.keys = _gather(layer.keys, columns)
                layer.values = _gather(layer.values, columns)


def _empty_cache(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    # A sliding window drops states that a rejected draft would need back, other ones of each
    # sequence. The mask alone makes the window as well.
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = DynamicLayer()
    return cache


def _copied(cache: DynamicCache) -> DynamicCache:
    """Another cache of the same states. Recurrent ones change in place; keys and values do not:
    more of them make a new tensor."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in twin.layers:
        for name, states in vars(layer).items():
            if name not in ("keys", "values"):
                setattr(layer, name, _cloned(states))
    return twin


def _cloned(states: Any) -> Any:
    """A tensor, or several by number."""
    if isinstance(states, dict):
        return {key: _cloned(state) for key, state in states.items()}
    return states.clone() if isinstance(states, Tensor) else states


def _require_movable(cache: DynamicCache) -> None:
    """ConfigError unless sequences can be moved within every layer of the cache."""
    other = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    if other:
        raise ConfigError(
            f"this target keeps {', '.join(sorted(other))} of a sequence beside keys and values, "
            "which are not cut for several sequences at once; set evaluate.batch_size=1"
        )


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """[b, g, w, d] and [c, g, u, d] -> [b + c, g, max(w, u), d], padded on the left."""
    width = max(first.shape[2], second.shape[2])
    padded = [
        torch.nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in (first, second)
    ]
    return torch.cat(padded)


def _gather(states: Tensor, columns: Tensor) -> Tensor:
    """states [b, g, w, d], columns [b, u] -> [b, g, u, d]; a negative column gives any other."""
    index = columns.clamp(min=0).to(states.device)[:, None, :, None]
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
