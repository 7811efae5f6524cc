"""Records of one draft from several files, fit for calibration, and their split by prompt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.errors import require
from dspark_megatron.evaluation.draft_records import (
    SAME_DRAFT,
    DraftRecords,
    check_same_draft,
    drafted_tokens,
)
from dspark_megatron.storage.checkpoints.named import checkpoint_facts

LISTED = ("temperature", "prompt_files")
"""Facts in which they may differ."""


def load_records(paths: Sequence[str | Path]) -> DraftRecords:
    """Records of all files as one; prompts are counted through. The facts are those of the first,
    but `temperature` and `prompt_files` are lists of what occurs.

    The same prompt in two files (other seeds or temperatures) stays one prompt, so that a split by
    prompt keeps its rounds together. ConfigError when the files cannot be taken together.
    """
    files = {Path(path): DraftRecords.load(path) for path in paths}
    require(len(files) == len(paths), f"--records names a file twice: {list(map(str, paths))}")
    first_path, first = next(iter(files.items()))
    for path, records in files.items():
        _check_usable(path, records)
        _check_same(path, records, first_path, first)
    prompts = _prompts_counted_through([*files.values()])
    names = ("confidence_logits", "accept_rate", "proposed", "accepted")
    tensors = {name: torch.cat([getattr(r, name) for r in files.values()]) for name in names}
    facts = {key: first.facts[key] for key in SAME_DRAFT}
    facts |= checkpoint_facts(first.facts)
    for key in LISTED:
        values = [r.facts[key] for r in files.values()]
        flat = [x for value in values for x in (value if isinstance(value, list) else [value])]
        facts[key] = list(dict.fromkeys(flat))
    return DraftRecords(**tensors, prompt=torch.cat(prompts), facts=facts)


def split_by_prompt(
    records: DraftRecords, fit_share: float, seed: int
) -> tuple[DraftRecords, DraftRecords]:
    """A part to fit on, with about fit_share of the prompts, and a part held out. Rounds of a
    prompt resemble each other, so they are never split."""
    prompts = records.prompt.unique()
    count = round(fit_share * len(prompts))
    require(
        0 < count < len(prompts),
        f"fit_share {fit_share} of {len(prompts)} prompts must leave at least one prompt on each "
        "side; record more prompts, or change --fit-share",
    )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    fit = torch.isin(records.prompt, prompts[order[:count]])
    return records.select(fit), records.select(~fit)


def _check_same(path: Path, records: DraftRecords, first_path: Path, first: DraftRecords) -> None:
    check_same_draft(
        records.facts,
        first.facts,
        lambda key, mine, wanted: (
            f"records must be of one draft: {key} is {mine!r} in {path} and {wanted!r} in "
            f"{first_path}; calibrate each draft by itself"
        ),
    )


def _check_usable(path: Path, records: DraftRecords) -> None:
    lacking = [key for key in (*SAME_DRAFT, *LISTED) if key not in records.facts]
    require(not lacking, f"{path} must say of which evaluation it is, lacks {', '.join(lacking)}")
    own = drafted_tokens(records.facts)
    require(
        own == records.num_draft_tokens,
        f"{path} must have the {own} draft tokens of its blocks, has {records.num_draft_tokens}",
    )
    logits, judged = records.confidence_logits, records.judged()
    require(
        not logits.isnan().all(),
        f"{path} is of a draft without a confidence head, so there is nothing to calibrate; train "
        "one with model.enable_confidence_head=true",
    )
    broken = int((~logits[judged].isfinite()).sum())
    require(
        broken == 0,
        f"{path} must have finite confidence logits in every judged slot, has {broken} of "
        f"{int(judged.sum())} that are not; evaluate again",
    )
    records.require_whole_drafts(path)


def _prompts_counted_through(parts: list[DraftRecords]) -> list[Tensor]:
    """Prompt numbers of every part; parts of the same prompt files share theirs, and the order of
    the parts does not matter."""
    lists = [part.facts["prompt_files"] for part in parts]
    counts: dict[str, Any] = {}
    for part, files in zip(parts, lists, strict=True):
        own, known = part.facts.get("prompts"), counts.get(json.dumps(files))
        require(
            None in (own, known) or own == known,
            f"records of the same prompt_files {files} must have as many prompts of each, have "
            f"{own} and {known}; evaluate with one evaluate.max_prompts",
        )
        counts[json.dumps(files)] = own
    keys = [json.dumps(files) for files in lists]
    owners = {file: key for files, key in zip(lists, keys, strict=True) for file in files}
    mixed = sorted({f for fs, k in zip(lists, keys, strict=True) for f in fs if owners[f] != k})
    require(
        not mixed,
        f"records must have the same prompt_files or none in common; {mixed} are in several "
        f"lists: {sorted(set(keys))}; give records of the same lists",
    )
    start, starts = 0, {}
    for key in sorted(set(keys)):
        starts[key] = start
        start += 1 + max(int(p.prompt.max()) for p, k in zip(parts, keys, strict=True) if k == key)
    return [part.prompt + starts[key] for part, key in zip(parts, keys, strict=True)]
