"""Lossless speculative decoding of one sequence, and plain decoding to compare with.

All tensor-parallel ranks run it together; every drawn token is rank 0's, so they stay in step.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.model.drafting import Drafter
from dspark_megatron.ops.acceptance import accept_or_resample, probabilities, sample
from dspark_megatron.ops.vocab_parallel import gather_vocab
from dspark_megatron.targets.base import Target


@dataclass
class Round:
    """One proposal and what became of it."""

    proposed: int
    """Draft tokens that were judged (fewer than the block when a stop token ended it)."""
    accepted: int
    """Draft tokens that the target kept."""
    bonus: bool
    """Whether the target added a token of its own."""

    @property
    def length(self) -> int:
        return self.accepted + self.bonus


@dataclass
class Generation:
    """A decoded answer."""

    token_ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    seconds: float = 0.0
    """Time after the prompt's own forward pass."""


class Decoder:
    """Decodes prompts with a target, with or without a draft."""

    def __init__(
        self,
        target: Target,
        draft: DSparkDraftModel,
        target_head: Tensor,
        *,
        temperature: float,
        max_new_tokens: int,
        stop_token_ids: list[int],
        device: torch.device,
    ) -> None:
        """target_head: this rank's [v/tp, h] rows of the target's LM head, in its dtype."""
        self.target, self.draft, self.target_head = target, draft, target_head
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.stop_token_ids, self.device = set(stop_token_ids), device
        self.tp_group = draft.tp_group

    def speculative(self, prompt: list[int], seed: int) -> Generation:
        """Decode with the draft; the output is distributed as the target's own."""
        generator = self._generator(seed)
        drafter, cache = Drafter(self.draft), self.target.new_cache()
        states = self.target.extend(self._row(prompt), cache)
        self.target.forget(cache, 0)
        drafter.extend(states.taps[0])
        token = self._draw(self._target_probs(states.last_hidden[0, -1:]), generator)
        result = Generation([int(token)])
        start = time.perf_counter()
        while not self._finished(result):
            anchor = torch.tensor(result.token_ids[-1:], device=self.device)
            proposal = drafter.propose(anchor, lambda logits: self._pick(logits, generator))
            states = self.target.extend(torch.cat([anchor, proposal.tokens])[None], cache)
            accepted, token = accept_or_resample(
                proposal.tokens,
                proposal.probs,
                self._target_probs(states.last_hidden[0]),
                generator,
            )
            accepted, token = self._agree(torch.stack([torch.tensor(accepted).to(token), token]))
            drafter.extend(states.taps[0, : accepted + 1])
            self.target.forget(cache, len(proposal.tokens) - accepted)
            self._commit(result, proposal.tokens[:accepted].tolist(), token, len(proposal.tokens))
        result.seconds = time.perf_counter() - start
        del result.token_ids[self.max_new_tokens :]
        return result

    def plain(self, prompt: list[int], seed: int) -> Generation:
        """Decode with the target alone, one token at a time."""
        generator = self._generator(seed)
        cache = self.target.new_cache()
        states = self.target.extend(self._row(prompt), cache)
        self.target.forget(cache, 0)
        token = self._draw(self._target_probs(states.last_hidden[0, -1:]), generator)
        result = Generation([int(token)])
        start = time.perf_counter()
        while not self._finished(result):
            states = self.target.extend(self._row(result.token_ids[-1:]), cache)
            self.target.forget(cache, 0)
            token = self._draw(self._target_probs(states.last_hidden[0, -1:]), generator)
            result.token_ids.append(int(token))
        result.seconds = time.perf_counter() - start
        return result

    def _commit(self, result: Generation, kept: list[int], token: int, proposed: int) -> None:
        """Append a round's tokens; a stop token among the kept ones ends the answer there."""
        for i, token_id in enumerate(kept):
            if token_id in self.stop_token_ids:
                result.token_ids += kept[: i + 1]
                result.rounds.append(Round(proposed=i + 1, accepted=i + 1, bonus=False))
                return
        result.token_ids += [*kept, token]
        result.rounds.append(Round(proposed=proposed, accepted=len(kept), bonus=True))

    def _finished(self, result: Generation) -> bool:
        stopped = result.token_ids[-1] in self.stop_token_ids
        return stopped or len(result.token_ids) >= self.max_new_tokens

    def _target_probs(self, last_hidden: Tensor) -> Tensor:
        """[q, h] -> fp32 [q, v], whole on every rank."""
        logits = last_hidden.to(self.target_head.dtype) @ self.target_head.t()
        logits = gather_vocab(logits, self.draft.shape.vocab_size, tp_group=self.tp_group)
        return probabilities(logits, self.temperature)

    def _pick(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        probs = probabilities(logits, self.temperature)
        return self._draw(probs, generator), probs

    def _draw(self, probs: Tensor, generator: torch.Generator) -> Tensor:
        """One token from [1, v] -> [1], the same on every rank."""
        token = sample(probs, generator)
        self._broadcast(token)
        return token

    def _agree(self, numbers: Tensor) -> list[int]:
        self._broadcast(numbers)
        return numbers.tolist()

    def _broadcast(self, tensor: Tensor) -> None:
        """Tensor-parallel rank 0's values on every rank, in place. One broadcast."""
        if self.tp_group.size() > 1:
            source = dist.get_global_rank(self.tp_group, 0)
            dist.broadcast(tensor, source, group=self.tp_group)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    def _row(self, token_ids: list[int]) -> Tensor:
        return torch.tensor([token_ids], device=self.device)
