"""Greedy answers with a draft must be the target's own, but for ties that rounding may break."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dspark_megatron.data.batch import Batch
from dspark_megatron.data.prompts.chat_prompts import Prompt
from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.decoding import Decoder
from dspark_megatron.evaluation.generation import Generation
from dspark_megatron.evaluation.run import FileResult


class Parting(NamedTuple):
    """Where two answers to one prompt part."""

    prompt: int
    place: int
    """Tokens that they share."""
    gap: float
    """From the target's largest logit there to the smaller of both tokens'."""
    rounding: float
    """How far float sums in another order may move the gap."""

    @property
    def is_tie(self) -> bool:
        return self.gap <= self.rounding


@torch.no_grad()
def check_lossless(
    decoder: Decoder, files: dict[str, list[Prompt]], results: dict[str, FileResult]
) -> dict[str, int]:
    """Answers by file name that part from plain decoding at a tie. All ranks call it together; one
    forward pass of the target for each answer that parts. Raises ConfigError for any other."""
    ties, faults, count = {}, [], 0
    for name, result in results.items():
        pairs = zip(files[name], result.generations, result.plain_generations, strict=True)
        found = [_parting(decoder, i, *pair) for i, pair in enumerate(pairs)]
        partings = [parting for parting in found if parting is not None]
        ties[name] = sum(parting.is_tie for parting in partings)
        faults += [(name, parting) for parting in partings if not parting.is_tie]
        count += len(found)
    if faults:
        name, first = faults[0]
        raise ConfigError(
            f"decoding was not lossless: {len(faults)} of {count} greedy answers are not the "
            f"target's own, and no rounding explains it. The first is prompt {first.prompt} of "
            f"{name}: after {first.place} tokens the target holds the tokens {first.gap:.3g} apart "
            f"in logits, and at most {first.rounding:.2g} may be rounding. No figures were "
            "written; it is no fault of the draft, whatever its weights are, but of how the "
            "target's family keeps a sequence (its cache): please report its model_type"
        )
    return ties


def _parting(
    decoder: Decoder, place: int, prompt: Prompt, drafted: Generation, plain: Generation
) -> Parting | None:
    """None for answers that are the same."""
    ours, own = drafted.token_ids, plain.token_ids
    if ours == own:
        return None
    shared = _shared(ours, own)
    if shared == min(len(ours), len(own)):  # one ends where the other goes on
        return Parting(place, shared, float("inf"), 0.0)
    ids = torch.tensor([prompt.input_ids + ours[:shared]], device=decoder.device)
    states = decoder.target.states(Batch(ids)).hidden[:, -1:]
    logits = decoder.target_logits(states)[0, 0].float()  # [v]
    both = logits[torch.tensor([ours[shared], own[shared]], device=logits.device)]
    gap = (logits.max() - both.min()).item()
    # As in the check of the target's logits: bf16 has 8 bits, fp32 differs by summation order.
    share = 1e-4 if decoder.target_head.weight.dtype == torch.float32 else 0.02
    return Parting(place, shared, gap, share * max(logits.abs().max().item(), 1.0))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the start that are the same."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
