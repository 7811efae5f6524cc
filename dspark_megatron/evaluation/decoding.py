"""Lossless speculative decoding of several sequences at once, and plain decoding to compare with.

All tensor-parallel ranks run it together; every drawn token is rank 0's, so they stay in step. A
sequence that is done makes room for the next prompt.

Shapes: b sequences under way, k slots, v vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.evaluation.generation import Decoded, Generation, Round
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.model.drafting import Drafter, Proposal
from dspark_megatron.ops.acceptance import judge, overlap, probabilities, sample
from dspark_megatron.ops.logit_transform import TargetHead
from dspark_megatron.ops.vocab_parallel import gather_vocab
from dspark_megatron.targets.base import DecodingTarget

Cut = Callable[[Tensor], Tensor]
"""How much of each draft to verify: confidence logits [b, k] -> lengths [b] in 0..k. What it says
of a slot must not depend on that slot's token or a later one, or decoding is not lossless."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, and where they end."""

    temperature: float
    """Of target and draft; 0 is greedy."""
    max_new_tokens: int
    stop_token_ids: frozenset[int]


@dataclass
class _Answer:
    """One sequence under way."""

    place: int
    """Of its prompt."""
    generator: torch.Generator
    generation: Generation


class Decoder:
    """Decodes prompts with a target, with or without a draft."""

    def __init__(
        self,
        target: DecodingTarget,
        draft: DSparkDraftModel,
        target_head: TargetHead,
        sampling: Sampling,
        *,
        batch_size: int,
        cut: Cut | None = None,
    ) -> None:
        """target_head: in the target's dtype. batch_size: sequences under way at one time. cut:
        None verifies whole drafts."""
        self.target, self.draft, self.target_head = target, draft, target_head
        self.sampling, self.batch_size, self.cut = sampling, batch_size, cut
        self.device, self.tp_group = target_head.weight.device, draft.tp_group

    def speculative(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        *,
        on_answer: Callable[[], object] = lambda: None,
    ) -> Decoded:
        """Decode with the draft; the output is distributed as the target's own. A seed belongs to
        its prompt: batches change nothing but rounding. on_answer is called after each answer."""
        return self._decode(_Drafted(self), prompts, seeds, on_answer)

    def plain(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        *,
        on_answer: Callable[[], object] = lambda: None,
    ) -> Decoded:
        """Decode with the target alone, one token at a time."""
        return self._decode(_Batch(self), prompts, seeds, on_answer)

    def _decode(
        self,
        batch: "_Batch",
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        on_answer: Callable[[], object],
    ) -> Decoded:
        waiting = deque(enumerate(zip(prompts, seeds, strict=True)))
        generations, seconds = [Generation() for _ in prompts], 0.0
        while waiting or batch.answers:
            while waiting and len(batch.answers) < self.batch_size:
                place, (prompt, seed) = waiting.popleft()
                generator = torch.Generator(device=self.device).manual_seed(seed)
                batch.start(prompt, _Answer(place, generator, generations[place]))
            start = time.perf_counter()
            while batch.answers and not batch.drop_finished(on_answer):
                batch.round()
            seconds += time.perf_counter() - start
        return Decoded(generations, seconds)

    def target_logits(self, last_hidden: Tensor) -> Tensor:
        """[b, q, h] -> [b, q, v], whole on every rank. One all-gather of logits."""
        logits = self.target_head.logits(last_hidden)
        return gather_vocab(logits, self.draft.shape.vocab_size, tp_group=self.tp_group)

    def target_probs(self, last_hidden: Tensor) -> Tensor:
        """[b, q, h] -> fp32 [b, q, v], whole on every rank. One all-gather of logits."""
        return probabilities(self.target_logits(last_hidden), self.sampling.temperature)

    def agree(self, numbers: Tensor) -> Tensor:
        """Tensor-parallel rank 0's values on every rank, in place. One broadcast."""
        if self.tp_group.size() > 1:
            source = dist.get_global_rank(self.tp_group, 0)
            dist.broadcast(numbers, source, group=self.tp_group)
        return numbers


class _Batch:
    """Sequences under way in plain decoding: a round adds the target's next token to each."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.target, self.sampling = decoder, decoder.target, decoder.sampling
        self.cache = decoder.target.new_cache()
        self.answers: list[_Answer] = []

    def start(self, prompt: list[int], answer: _Answer) -> Tensor:
        """Take in a prompt and draw the answer's first token; returns the prompt's taps."""
        prompt_ids = torch.tensor([prompt], device=self.decoder.device)
        states = self.target.add_sequence(prompt_ids, self.cache)
        self.answers.append(answer)
        probs = self.decoder.target_probs(states.hidden[:, -1:])
        first = self.decoder.agree(sample(probs[0], [answer.generator]))
        answer.generation.token_ids.append(int(first))
        return states.taps[0]

    def drop_finished(self, on_answer: Callable[[], object]) -> bool:
        """Whether there was one; answers are cut to their largest length."""
        going = [i for i, answer in enumerate(self.answers) if not self._finished(answer)]
        if len(going) == len(self.answers):
            return False
        for answer in self.answers:
            if self._finished(answer):
                del answer.generation.token_ids[self.sampling.max_new_tokens :]
                on_answer()
        self.keep(going)
        return True

    def keep(self, sequences: list[int]) -> None:
        self.answers = [self.answers[i] for i in sequences]
        self.target.keep(self.cache, sequences)

    def round(self) -> None:
        states = self.target.extend(self._anchors()[:, None], self.cache)
        self.target.forget(self.cache, [0] * len(self.answers))
        probs = self.decoder.target_probs(states.hidden)
        for answer, token in zip(self.answers, self.draw(probs[:, 0]).tolist(), strict=True):
            answer.generation.token_ids.append(token)

    def draw(self, probs: Tensor) -> Tensor:
        """One token for each sequence from probs [b, v], the same on every rank. One broadcast."""
        return self.decoder.agree(sample(probs, self._generators()))

    def _generators(self) -> list[torch.Generator]:
        return [answer.generator for answer in self.answers]

    def _anchors(self) -> Tensor:
        """[b] last known token of each sequence."""
        last = [answer.generation.token_ids[-1] for answer in self.answers]
        return torch.tensor(last, device=self.decoder.device)

    def _finished(self, answer: _Answer) -> bool:
        token_ids = answer.generation.token_ids
        stopped = token_ids[-1] in self.sampling.stop_token_ids
        return stopped or len(token_ids) >= self.sampling.max_new_tokens


class _Drafted(_Batch):
    """Sequences under way in speculative decoding: a round drafts for all, and verifies."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.drafter = Drafter(decoder.draft)

    def start(self, prompt: list[int], answer: _Answer) -> Tensor:
        taps = super().start(prompt, answer)
        self.drafter.add(taps)
        return taps

    def keep(self, sequences: list[int]) -> None:
        super().keep(sequences)
        self.drafter.keep(sequences)

    def round(self) -> None:
        anchors, contexts = self._anchors(), list(self.drafter.lengths)
        proposal = self.drafter.propose(anchors, self._pick)
        lengths = self._lengths(proposal)  # [b]
        width = int(lengths.max())
        tokens, probs = proposal.tokens[:, :width], proposal.probs[:, :width]
        states = self.target.extend(torch.cat([anchors[:, None], tokens], dim=1), self.cache)
        target_probs = self.decoder.target_probs(states.hidden)  # [b, width + 1, v]
        draws = self._uniform(proposal.tokens.shape[1])[:, :width]
        accepted, next_probs = judge(tokens, probs, target_probs, lengths, draws)
        # Rounding may differ between ranks: rank 0's count goes with rank 0's token.
        token = sample(next_probs, self._generators())
        accepted, token = self.decoder.agree(torch.stack([accepted, token]))
        kept = accepted.tolist()
        self.target.forget(self.cache, [width - n for n in kept])
        self.drafter.extend([taps[: n + 1] for taps, n in zip(states.taps, kept, strict=True)])
        rates = overlap(probs, target_probs[:, :-1])
        self._commit(proposal, lengths.tolist(), kept, token.tolist(), rates)
        for answer, context in zip(self.answers, contexts, strict=True):
            answer.generation.rounds[-1].context = context

    def _pick(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probs = probabilities(logits, self.sampling.temperature)
        return self.draw(probs), probs

    def _lengths(self, proposal: Proposal) -> Tensor:
        """Draft tokens of each sequence that are verified, the same on every rank. [b]"""
        b, k = proposal.tokens.shape
        if self.decoder.cut is None:
            return torch.full((b,), k, device=proposal.tokens.device)
        assert proposal.confidence_logits is not None, "a draft without the head is not cut"
        return self.decoder.agree(self.decoder.cut(proposal.confidence_logits))

    def _uniform(self, count: int) -> Tensor:
        """[b, count] in [0, 1), as many from each sequence's generator in every round."""
        device = self.decoder.device
        return torch.stack(
            [torch.rand(count, generator=own, device=device) for own in self._generators()]
        )

    def _commit(
        self,
        proposal: Proposal,
        lengths: list[int],
        kept: list[int],
        bonus: list[int],
        rates: Tensor,
    ) -> None:
        """Append a round's tokens; a stop token among the kept ones ends the answer there."""
        logits = proposal.confidence_logits
        for i, answer in enumerate(self.answers):
            length, own = lengths[i], proposal.tokens[i, : kept[i]].tolist()
            stops = [j for j, token in enumerate(own) if token in self.sampling.stop_token_ids]
            new = Round(length, len(own), bonus=True)
            if stops:
                own = own[: stops[0] + 1]
                new = Round(len(own), len(own), bonus=False)
            else:
                own = [*own, bonus[i]]
            new.confidence_logits = [] if logits is None else logits[i].tolist()
            new.accept_rate = rates[i, :length].tolist()
            answer.generation.token_ids += own
            answer.generation.rounds.append(new)
