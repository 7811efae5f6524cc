"""Sequences that grow, kept as their tokens alone."""

import torch
from torch import Tensor


class TokenCache:
    """The tokens of several sequences. A GPTModel without a key/value cache runs them anew for
    every step: the work of an answer grows with the square of its length."""

    def __init__(self) -> None:
        self.sequences: list[Tensor] = []

    def extend(self, input_ids: Tensor) -> None:
        """input_ids [b, q]: the next tokens of each."""
        pairs = zip(self.sequences, input_ids, strict=True)
        self.sequences = [torch.cat([old, new]) for old, new in pairs]

    def forget(self, tokens: list[int]) -> None:
        """Drop the last `tokens` (>= 0) of each."""
        pairs = zip(self.sequences, tokens, strict=True)
        self.sequences = [sequence[: len(sequence) - n] for sequence, n in pairs]

    def keep(self, rows: list[int]) -> None:
        """Drop all but these, in this order."""
        self.sequences = [self.sequences[row] for row in rows]

    def padded(self) -> Tensor:
        """[b, longest], padded on the right."""
        return torch.nn.utils.rnn.pad_sequence(self.sequences, batch_first=True)
