"""Provider `cache`: states that were stored before, found by the content of a sample."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.nn.utils.rnn import pad_sequence

from dspark_megatron.data.batch import Batch
from dspark_megatron.data.conversation import Sample
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.transfer import to_device
from dspark_megatron.targets.base import StatesSource, TargetStates
from dspark_megatron.targets.stored.layout import StatesReader
from dspark_megatron.targets.stored.verification import ShardChecks

_AHEAD = 2
"""Batches read before they are asked for, at most; they lie in memory."""


class StoredStates(StatesSource):
    """States of the samples of a data set. What was not kept of them is NaN: nothing may read it,
    and a mistake would show."""

    lockstep = False

    def __init__(
        self,
        reader: StatesReader,
        data: ConversationDataset | Sequence[Sample],
        *,
        device: torch.device,
        hints: Sequence[str] = (),
        checks: ShardChecks | None = None,
    ) -> None:
        """data: the samples of a run; the folder must have them all and may have others. hints: how
        the data differ from those whose states are stored. checks: of shards, to be made while
        training goes on; the first that is damaged ends it."""
        self._reader, self._device, self._checks = reader, device, checks
        places = {key: place for place, key in enumerate(reader.keys())}
        wanted = [reader.key(*data[i]) for i in range(len(data))]
        missing = [i for i, key in enumerate(wanted) if key not in places]
        if missing:
            raise ConfigError(
                f"the stored states {reader.path} must be of every sample of data.train_files, and "
                f"lack {len(missing):,} of {len(wanted):,} (the first is sample {missing[0]}, from "
                f"0): {'; '.join(hints) or 'other tokens or loss masks'}. Store the states of "
                "these data, or set target.provider=huggingface"
            )
        self._places = [places[key] for key in wanted]
        self._thread = ThreadPoolExecutor(1, "states-reader")
        self._expected: deque[Batch] = deque()
        self._ahead: deque[tuple[tuple[int, ...], Future[TargetStates]]] = deque()
        if checks is not None:
            checks.start()

    def is_checked(self, seconds: float) -> bool:
        """Whether all of this rank's shards are checked, within so long; ConfigError for a damaged
        one."""
        return self._checks is None or self._checks.is_done(seconds)

    def expect(self, batches: Sequence[Batch]) -> None:
        self._ahead.clear()
        self._expected = deque(batches)
        self._read_ahead()

    def states(self, batch: Batch) -> TargetStates:
        """Taps are padded to the longest context only, c of them: [b, c, m*h]. ConfigError once a
        shard of the folder was found to be damaged."""
        if self._checks is not None:
            self._checks.raise_if_damaged()
        while self._ahead and self._ahead[0][0] != batch.sample_indices:
            self._ahead.popleft()  # what teaches nothing is not asked for
        found = self._ahead.popleft()[1].result() if self._ahead else self._read(batch)
        self._read_ahead()
        last_hidden = found.last_hidden
        return TargetStates(
            to_device(found.taps, self._device),
            None if last_hidden is None else to_device(last_hidden, self._device),
        )

    def _read_ahead(self) -> None:
        """Have the thread read what comes next, while the device works on what is there."""
        while self._expected and len(self._ahead) < _AHEAD:
            batch = self._expected.popleft()
            self._ahead.append((batch.sample_indices, self._thread.submit(self._read, batch)))

    def _read(self, batch: Batch) -> TargetStates:
        parts = [self._reader.states(self._places[i]) for i in batch.sample_indices]
        taps = pad_sequence([part.taps for part in parts], True, torch.nan)
        kept = [part.last_hidden for part in parts if part.last_hidden is not None]
        if not kept:
            return TargetStates(taps, None)
        # At their positions: [b, s, h].
        size = *batch.input_ids.shape, kept[0].shape[-1]
        last_hidden = kept[0].new_full(size, torch.nan)
        for states, part, own in zip(last_hidden, parts, kept, strict=True):
            states[part.positions] = own
        return TargetStates(taps, last_hidden)
