"""Throughput of serving R requests at once, by what decides how much of each draft is verified.

Recorded rounds are replayed: each of R requests goes through those of one prompt after the other.
A step takes `1 / SPS(tokens verified)` seconds and the time of a draft; a request that verifies l
slots of a round gains the ones among them that the target kept, and one token more. Between the
points of a table that clock goes by straight lines, however the scheduler reads the table: floor
look-up would give away the time of all tokens between two points.

A round is replayed as it was recorded. In truth a shorter verification, which gains fewer tokens,
would have had the next draft begin earlier in the answer; here every policy sees the same rounds in
the same steps, so policies compare on equal terms, and no policy ends an answer sooner.

Shapes: n recorded rounds, R requests, k slots.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.errors import require
from dspark_megatron.evaluation.confidence.temperature_scaling import confidence as calibrated
from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.serving.settings import ServingSettings
from dspark_megatron.evaluation.serving.sps_table import SpsTable, interpolated, sps_of_step
from dspark_megatron.evaluation.serving.verify_policies import Policy, verify_policies


def simulate_serving(
    records: DraftRecords, table: SpsTable, requests: list[int], settings: ServingSettings
) -> list[dict[str, Any]]:
    """Figures of every policy at every number of requests. ConfigError before any of it when
    something cannot be simulated.

    `tokens_per_second` of all requests and `per_request`, `tau` (tokens gained by a request in a
    step), `verified` (draft slots of a request in a step), `speedup` over no drafting.
    """
    settings.check(records.num_draft_tokens)
    check_replayable(records)
    require(min(requests, default=0) >= 1, f"requests must be numbers >= 1, are {requests}")
    clock = interpolated(table)
    known = clock if settings.interpolate else table
    costs = {
        r: [sps_of_step(t, r, records.num_draft_tokens) for t in (known, clock)] for r in requests
    }
    temperatures = settings.temperatures or [1.0] * records.num_draft_tokens
    confidence = calibrated(records.confidence_logits, temperatures)  # [n, k]
    figures = []
    for count, (known_sps, sps) in costs.items():
        counted = max(64, -(-settings.rounds // count))
        steps = list(replay(records, count, settings.lag + counted, settings.seed))
        rows = [
            _serve(policy, records, confidence, steps, sps, settings)
            for policy in verify_policies(
                known_sps,
                records.num_draft_tokens,
                thresholds=settings.thresholds,
                lag=settings.lag,
            )
        ]
        plain = rows[0]["tokens_per_second"]
        figures += [{**row, "speedup": row["tokens_per_second"] / plain} for row in rows]
    return figures


def check_replayable(records: DraftRecords) -> None:
    """ConfigError unless every round says what any length of verification would have gained."""
    records.require_whole_drafts("the simulation's records")
    require(
        bool(records.confidence_logits.isfinite().all()),
        "the records hold confidence logits that are not finite; record drafts of a draft with a "
        "confidence head",
    )


def replay(records: DraftRecords, requests: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Rounds of R requests, step by step: indices [R] into the records.

    Prompts come in an order of their own for each seed, over and over; a request that has replayed
    the last round of its prompt takes the next prompt. The first prompts begin anywhere in their
    rounds, so that requests do not end together.
    """
    generator = torch.Generator().manual_seed(seed)
    order, ends = _by_prompt(records)
    last = ends.nonzero().flatten()  # [prompts]
    first = torch.cat([last.new_zeros(1), last[:-1] + 1])
    queue = torch.randperm(len(last), generator=generator)
    prompt = queue[torch.arange(requests) % len(queue)]  # [R]
    served = requests
    lengths = last[prompt] - first[prompt] + 1
    place = first[prompt] + (torch.rand(requests, generator=generator) * lengths).long()
    for _ in range(steps):
        yield order[place]
        done = place == last[prompt]
        place = place + 1
        count = int(done.sum())
        prompt[done] = queue[(served + torch.arange(count)) % len(queue)]
        place[done] = first[prompt[done]]
        served += count


def tokens_gained(records: DraftRecords, rounds: Tensor, lengths: Tensor) -> Tensor:
    """Tokens of rounds [R] of which so many slots [R] are verified -> [R].

    The target adds no token behind a stop token that it kept; one in the last slot of a block
    cannot be told from any other, so its round counts one token too many.
    """
    accepted, proposed = records.accepted[rounds], records.proposed[rounds]
    stopped = (proposed < records.num_draft_tokens) & (lengths >= proposed)
    return torch.minimum(lengths, accepted) + 1 - stopped.long()


def _serve(
    policy: Policy,
    records: DraftRecords,
    confidence: Tensor,
    steps: list[Tensor],
    sps: Tensor,
    settings: ServingSettings,
) -> dict[str, Any]:
    """One policy over all steps, of which the first `lag` do not count: a budget has no earlier
    confidences there. confidence [n, k] of all rounds, sps [R*k + 1]."""
    tokens, verified, seconds = 0, 0, 0.0
    for number, rounds in enumerate(steps):
        lengths = policy.lengths(confidence[rounds])
        if number < settings.lag:
            continue
        slots = int(lengths.sum())
        tokens += int(tokens_gained(records, rounds, lengths).sum())
        verified += slots
        seconds += 1 / float(sps[slots]) + settings.draft_seconds * policy.drafts
    requests = len(steps[0])
    served = requests * (len(steps) - settings.lag)
    return {
        "requests": requests,
        "policy": policy.name,
        "tokens_per_second": tokens / seconds,
        "per_request": tokens / seconds / requests,
        "tau": tokens / served,
        "verified": verified / served,
    }


def _by_prompt(records: DraftRecords) -> tuple[Tensor, Tensor]:
    """Indices of the rounds, prompt by prompt [n], and which of these are the last of theirs."""
    order = records.prompt.argsort(stable=True)
    prompts = records.prompt[order]
    ends = torch.ones(len(order), dtype=torch.bool)
    ends[:-1] = prompts[1:] != prompts[:-1]
    return order, ends
