"""Acceptance figures of decoded prompts, with intervals from a bootstrap over prompts.

Shapes: p prompts, f figures, k slots.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.evaluation.generation import Decoded, Generation, Round

RESAMPLES = 1000
"""Of the prompts, for the intervals; they come from a fixed seed."""
_QUANTILES = (0.025, 0.975)


def acceptance(generations: Sequence[Generation], num_draft_tokens: int) -> dict[str, Any]:
    """Figures over all prompts. A figure with nothing to count is null.

    `tau`: mean tokens of a round, bonus token included. `accept_rate[j]`: share of the tokens at
    slot j that were kept, of those whose predecessors were. `prefix_survival[j]`: share of the
    drafts with a slot j whose first j + 1 tokens were all kept. `verify_rate`: tokens gained per
    token that the target had to verify. `confidence_intervals`: of each of them, 95%, by resampling
    prompts; rounds of a prompt are not independent of one another. Null below two prompts.
    """
    counts = torch.tensor(
        [_parts(g.rounds, num_draft_tokens) for g in generations], dtype=torch.float64
    )
    parts, wholes = counts.reshape(-1, 2, 2 * num_draft_tokens + 2).unbind(1)
    values = _by_name(_ratios(parts.sum(0), wholes.sum(0)), num_draft_tokens)
    return {
        "prompts": len(generations),
        "new_tokens": sum(len(g.token_ids) for g in generations),
        "rounds": sum(len(g.rounds) for g in generations),
        **values,
        "confidence_intervals": _intervals(parts, wholes, num_draft_tokens),
    }


def tau_difference(
    ours: Sequence[Generation], theirs: Sequence[Generation]
) -> dict[str, float | list[float] | None]:
    """Of two drafts on the same prompts: `value`, our tau less theirs, and its 95% `interval`. Both
    are resampled together, so how hard a prompt is drops out. Null where there is nothing to count,
    and the interval below two prompts."""
    taus, once, times = [], torch.ones(1, len(ours)), _times_drawn(len(ours))
    for generations in (ours, theirs):
        lengths = [[sum(r.length for r in g.rounds), len(g.rounds)] for g in generations]
        counts = torch.tensor(lengths, dtype=torch.float64).reshape(-1, 2)
        parts, wholes = (torch.cat([once.double(), times]) @ counts).unbind(1)
        taus.append(_ratios(parts, wholes))
    value, *resampled = (taus[0] - taus[1]).tolist()
    bounds = torch.tensor(_QUANTILES, dtype=torch.float64)
    interval = torch.tensor(resampled, dtype=torch.float64).nanquantile(bounds).tolist()
    return {
        "value": _none_for_nan(value),
        "interval": _none_for_nan(interval) if len(ours) > 1 else None,
    }


def speed(decoded: Sequence[Decoded]) -> float | None:
    """Tokens per second of one replica; an answer's first token belongs to its prompt's pass."""
    tokens = sum(len(g.token_ids) - 1 for d in decoded for g in d.generations)
    return _ratio(tokens, sum(d.seconds for d in decoded))


def comparison(
    speculative: Sequence[Decoded], plain: Sequence[Decoded] | None
) -> dict[str, float | int | None]:
    """Speeds of both ways of decoding the same prompts, share by share of the replicas."""
    rounds = sum(len(g.rounds) for d in speculative for g in d.generations)
    figures = {
        "tokens_per_second": speed(speculative),
        "drafts_per_second": _ratio(rounds, sum(d.seconds for d in speculative)),
    }
    if plain is None:
        return figures
    pairs = zip(speculative, plain, strict=True)
    return {
        **figures,
        "plain_tokens_per_second": speed(plain),
        "speedup": _ratio(figures["tokens_per_second"] or 0, speed(plain) or 0),
        "identical_to_plain": sum(
            s.token_ids == p.token_ids
            for one, other in pairs
            for s, p in zip(one.generations, other.generations, strict=True)
        ),
    }


def _parts(rounds: Sequence[Round], num_draft_tokens: int) -> list[list[int]]:
    """Numerators and denominators of one prompt's figures, in the order of `_by_name`: [2, f]."""
    slots = range(num_draft_tokens)
    kept = [sum(r.accepted > j for r in rounds) for j in slots]
    offered = [sum(r.proposed > j for r in rounds) for j in slots]
    reached = [sum(r.proposed > j and r.accepted >= j for r in rounds) for j in slots]
    gained, verified = sum(r.length for r in rounds), sum(r.proposed + 1 for r in rounds)
    return [[gained, gained, *kept, *kept], [len(rounds), verified, *reached, *offered]]


def _intervals(parts: Tensor, wholes: Tensor, num_draft_tokens: int) -> dict[str, Any] | None:
    prompts = len(parts)
    if prompts < 2:
        return None
    times = _times_drawn(prompts)
    ratios = _ratios(times @ parts, times @ wholes)  # [resamples, f]
    bounds = torch.tensor(_QUANTILES, dtype=torch.float64)
    return _by_name(ratios.nanquantile(bounds, dim=0).t(), num_draft_tokens)


def _times_drawn(prompts: int) -> Tensor:
    """How often each resample has each prompt: [resamples, p], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(prompts, (RESAMPLES, prompts), generator=generator)
    times = torch.zeros(RESAMPLES, prompts, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def _ratios(parts: Tensor, wholes: Tensor) -> Tensor:
    """NaN where there is nothing to count."""
    return torch.where(wholes > 0, parts / wholes, torch.nan)


def _by_name(values: Tensor, num_draft_tokens: int) -> dict[str, Any]:
    """values [f] or [f, 2] -> numbers or pairs by name; null for NaN."""
    numbers = [_none_for_nan(value) for value in values.tolist()]
    return {
        "tau": numbers[0],
        "verify_rate": numbers[1],
        "accept_rate": numbers[2 : 2 + num_draft_tokens],
        "prefix_survival": numbers[2 + num_draft_tokens :],
    }


def _none_for_nan(value: Any) -> Any:
    if isinstance(value, list):
        return None if value[0] != value[0] else value
    return None if value != value else value


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
