"""Evaluate a draft on prompt files: decode every prompt, count, report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dspark_megatron.config import EvaluateConfig
from dspark_megatron.data.prompts.chat_prompts import Prompt
from dspark_megatron.evaluation.context_lengths import by_context
from dspark_megatron.evaluation.decoding import Decoder
from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.estimate import EstimateSettings, answer_sample, estimate_acceptance
from dspark_megatron.evaluation.figures import acceptance, comparison, tau_difference
from dspark_megatron.evaluation.generation import Decoded, Generation
from dspark_megatron.progress import Progress


@dataclass(frozen=True)
class FileResult:
    """One prompt file, decoded by all data-parallel ranks."""

    speculative: list[Decoded]
    """Each rank's share; rank r has the prompts r, r + ranks, ..."""
    plain: list[Decoded] | None
    """None when nothing was compared."""

    @property
    def generations(self) -> list[Generation]:
        """Answers with drafts, in the order of the prompts."""
        return _in_order(self.speculative)

    @property
    def plain_generations(self) -> list[Generation]:
        """Answers of the target alone; only where it was compared."""
        assert self.plain is not None
        return _in_order(self.plain)

    def figures(self, num_draft_tokens: int, context_edges: Sequence[int]) -> dict[str, Any]:
        return _figures(
            self.generations, self.speculative, self.plain, num_draft_tokens, context_edges
        )


def _figures(
    generations: list[Generation],
    speculative: list[Decoded],
    plain: list[Decoded] | None,
    num_draft_tokens: int,
    context_edges: Sequence[int],
) -> dict[str, Any]:
    return {
        **acceptance(generations, num_draft_tokens),
        **comparison(speculative, plain),
        "by_context": by_context(generations, num_draft_tokens, context_edges),
    }


def evaluate_prompts(
    decoder: Decoder,
    files: dict[str, list[Prompt]],
    config: EvaluateConfig,
    *,
    dp_group: dist.ProcessGroup,
    show_progress: bool,
    plain: Mapping[str, list[Decoded] | None] | None = None,
) -> dict[str, FileResult]:
    """Results by file name, the same on every rank. Prompts are dealt out to data-parallel ranks; a
    prompt's random numbers depend on its place in its file alone. plain: what the target alone has
    made of these files before, each rank's share; else it decodes them too, if it is wanted."""
    results, known = {}, plain or {}
    for name, prompts in files.items():
        mine = range(dp_group.rank(), len(prompts), dp_group.size())
        ids, seeds = [prompts[i].input_ids for i in mine], [config.seed + i for i in mine]
        decodes_plain = config.compare_plain and known.get(name) is None
        passes = 2 if decodes_plain else 1
        with Progress(passes * len(ids), name, "prompts", show=show_progress) as bar:
            shares = [decoder.speculative(ids, seeds, on_answer=bar.update)]
            if decodes_plain:
                shares.append(decoder.plain(ids, seeds, on_answer=bar.update))
        speculative, *new = zip(*_gather(shares, dp_group), strict=True)
        results[name] = FileResult(list(speculative), list(new[0]) if new else known.get(name))
    return results


def all_figures(
    results: dict[str, FileResult], num_draft_tokens: int, context_edges: Sequence[int] = ()
) -> dict[str, dict[str, Any]]:
    """Figures by file name, and over several files under `all`."""
    how = num_draft_tokens, context_edges
    figures = {name: result.figures(*how) for name, result in results.items()}
    if len(results) > 1:
        parts = list(results.values())
        plain = [share for part in parts for share in part.plain or []]
        speculative = [share for part in parts for share in part.speculative]
        everything = [g for part in parts for g in part.generations]
        figures["all"] = _figures(everything, speculative, plain or None, *how)
    return figures


def add_differences(
    figures: dict[str, dict[str, Any]],
    results: dict[str, FileResult],
    first: dict[str, FileResult],
) -> None:
    """`tau_difference` of each file, and of all: to another draft's tau on the same prompts."""
    pairs = {name: (results[name].generations, first[name].generations) for name in results}
    ours, theirs = ([g for pair in pairs.values() for g in pair[i]] for i in (0, 1))
    for name in figures:
        figures[name]["tau_difference"] = tau_difference(*pairs.get(name, (ours, theirs)))


def estimates(
    decoder: Decoder,
    files: dict[str, list[Prompt]],
    results: dict[str, FileResult],
    settings: EstimateSettings,
    *,
    dp_group: dist.ProcessGroup,
) -> dict[str, dict[str, Any]]:
    """By file name what the estimate without generation says of the same answers, to compare it
    with what decoding them took. All ranks call it together."""
    found = {}
    for name, result in results.items():
        answers = zip(files[name], result.generations, strict=True)
        samples = [answer_sample(prompt.input_ids, answer.token_ids) for prompt, answer in answers]
        found[name] = estimate_acceptance(
            decoder.draft,
            decoder.target,
            decoder.target_head,
            samples,
            settings,
            dp_group=dp_group,
        )
    return found


def draft_records(
    results: dict[str, FileResult], num_draft_tokens: int, facts: dict[str, Any]
) -> DraftRecords:
    """All rounds of all files as records; logits are NaN without a confidence head."""
    answers = [g for result in results.values() for g in result.generations]
    rounds = [(place, r) for place, g in enumerate(answers) for r in g.rounds]
    return DraftRecords(
        confidence_logits=_padded([r.confidence_logits for _, r in rounds], num_draft_tokens),
        accept_rate=_padded([r.accept_rate for _, r in rounds], num_draft_tokens),
        proposed=torch.tensor([r.proposed for _, r in rounds], dtype=torch.int64),
        accepted=torch.tensor([r.accepted for _, r in rounds], dtype=torch.int64),
        prompt=torch.tensor([place for place, _ in rounds], dtype=torch.int64),
        facts=facts,
    )


def _gather(shares: list[Decoded], dp_group: dist.ProcessGroup) -> list[list[Decoded]]:
    """All ranks' shares, rank by rank. One all-gather of Python objects."""
    if dp_group.size() == 1:
        return [shares]
    everyones: list[list[Decoded]] = [[] for _ in range(dp_group.size())]
    dist.all_gather_object(everyones, shares, group=dp_group)
    return everyones


def _in_order(shares: list[Decoded]) -> list[Generation]:
    count = sum(len(share.generations) for share in shares)
    return [shares[i % len(shares)].generations[i // len(shares)] for i in range(count)]


def _padded(rows: list[list[float]], width: int) -> torch.Tensor:
    """[n, width] fp32, NaN after the end of a row."""
    padded = [row + [float("nan")] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.float32).reshape(-1, width)
