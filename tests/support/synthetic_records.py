"""Records of rounds that never were, of a confidence head whose temperatures are known."""

import torch

from dspark_megatron.evaluation.draft_records import DraftRecords

FACTS = {
    "target": "target",
    "checkpoint": "runs/x/checkpoints/iter_0000100",
    "iteration": 100,
    "temperature": 1.0,
    "prompt_files": ["prompts.jsonl"],
}


def synthetic_records(*, prompts, rounds, temperatures, seed=0, stop_every=None, **facts):
    """prompts * rounds rounds. A slot that is reached is kept with chance sigmoid(logit / T_j), its
    accept_rate. stop_every: every so many rounds a stop token ends the draft at its last kept
    slot, if it has one."""
    generator = torch.Generator().manual_seed(seed)
    count, slots = prompts * rounds, len(temperatures)
    logits = 3 * torch.randn(count, slots, generator=generator) + 2
    accept_rate = (logits / torch.tensor(temperatures)).sigmoid()
    kept = torch.bernoulli(accept_rate, generator=generator).bool()
    accepted = kept.long().cumprod(dim=1).sum(dim=1)
    proposed = torch.full((count,), slots)
    if stop_every:
        stops = (torch.arange(count) % stop_every == stop_every - 1) & (accepted > 0)
        proposed[stops] = accepted[stops]
    return DraftRecords(
        confidence_logits=logits,
        accept_rate=accept_rate,
        proposed=proposed,
        accepted=accepted,
        prompt=torch.arange(prompts).repeat_interleave(rounds),
        facts={**FACTS, "block_size": slots, **facts},
    )
