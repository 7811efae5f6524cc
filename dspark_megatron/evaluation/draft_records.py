"""What was drafted and what became of it, round by round: the input of calibration, of the
threshold sweep and of the serving simulation.

Shapes: n rounds (of all prompts), k draft tokens of a block.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.checkpoints.named import NamedCheckpoint, is_same_checkpoint
from dspark_megatron.storage.safetensors_folder import write_tensors

_KINDS = {
    "confidence_logits": (2, torch.float32),
    "accept_rate": (2, torch.float32),
    "proposed": (1, torch.int64),
    "accepted": (1, torch.int64),
    "prompt": (1, torch.int64),
}
"""Dimensions and type of each tensor."""


@dataclass(frozen=True)
class DraftRecords:
    """Rounds of speculative decoding, those of a prompt in their order."""

    confidence_logits: Tensor
    """[n, k] fp32 of every drafted slot; given the draft's own tokens before it."""
    accept_rate: Tensor
    """[n, k] fp32 in [0, 1]: 1 - tvd of the draft's and the target's distribution, given the
    draft's own tokens before the slot; NaN where the target did not look."""
    proposed: Tensor
    """[n] int64 in 0..k: slots that were judged; fewer than k when a stop token ended the answer or
    a scheduler cut the draft."""
    accepted: Tensor
    """[n] int64 in 0..proposed: slots that the target kept, all before the first rejected."""
    prompt: Tensor
    """[n] int64: place of the prompt among all prompts of the evaluation."""
    facts: dict[str, Any]
    """Of the evaluation: `block_size`, `num_draft_tokens`, `temperature`, `target`, `checkpoint`,
    `iteration`, `scheduler`, `prompt_files`, `prompts` (how many of each file), as in its JSON."""

    def __len__(self) -> int:
        return len(self.accepted)

    @property
    def num_draft_tokens(self) -> int:
        return self.confidence_logits.shape[1]

    def judged(self) -> Tensor:
        """[n, k] bool: slots of which it is known whether the draft survived them."""
        return torch.arange(self.num_draft_tokens) < self.proposed[:, None]

    def survived(self) -> Tensor:
        """[n, k] bool: the slot's token and all before it were kept."""
        return torch.arange(self.num_draft_tokens) < self.accepted[:, None]

    def require_whole_drafts(self, source: object) -> None:
        """ConfigError unless every draft was judged to its end, or to the stop token that ended the
        answer: of a draft that a scheduler cut, what its later slots were worth is not known."""
        scheduler = self.facts.get("scheduler", "none")
        ends = torch.ones(len(self), dtype=torch.bool)
        ends[:-1] = self.prompt[1:] != self.prompt[:-1]
        stopped = ends & (self.accepted == self.proposed)
        cut = int(((self.proposed < self.num_draft_tokens) & ~stopped).sum())
        require(
            scheduler == "none" and cut == 0,
            f"{source} must hold whole drafts, judged up to the last slot or an accepted stop "
            f"token, has {cut} of {len(self)} that were cut (scheduler: {scheduler}); evaluate "
            "with evaluate.scheduler=none",
        )

    def select(self, rounds: Tensor) -> "DraftRecords":
        """Some of the rounds: indices or a mask over n."""
        tensors = {name: getattr(self, name)[rounds] for name in _KINDS}
        return DraftRecords(**tensors, facts=self.facts)

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name).contiguous() for name in _KINDS}
        write_tensors(path, tensors, {"facts": json.dumps(self.facts)})

    @classmethod
    def load(cls, path: str | Path) -> "DraftRecords":
        """Read what `save` wrote; ConfigError when it is no such file."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                facts = json.loads((file.metadata() or {}).get("facts", "null"))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ConfigError(
                f"{path} must be the draft records of an evaluation (evaluate.records): {error}"
            ) from error
        return cls(**_checked(path, tensors, facts), facts=facts)


SAME_DRAFT = ("target", "checkpoint", "iteration", "block_size")
"""Facts that results of one draft share."""


def check_same_draft(
    facts: dict[str, Any], others: dict[str, Any], said: Callable[[str, Any, Any], str]
) -> None:
    """ConfigError with what `said` makes of the first fact that differs and its two values.
    Checkpoints are compared by their digests, where both are known: a run may have moved."""
    named = map(NamedCheckpoint.of_facts, (facts, others))
    is_same = is_same_checkpoint(*named)
    facts, others = ({"weights": "trained", **one} for one in (facts, others))
    for key in SAME_DRAFT:
        same = is_same if key == "checkpoint" else facts.get(key) == others.get(key)
        if key == "checkpoint" and not is_same:
            names = ("weights", key, "checkpoint_digest")
            key = next((x for x in names if facts.get(x) != others.get(x)), key)
        require(same, said(key, facts.get(key), others.get(key)))


def drafted_tokens(facts: dict[str, Any]) -> Any:
    """How many a block drafts, by the facts of an evaluation. Older ones say the block size alone,
    which was the same."""
    return facts.get("num_draft_tokens", facts.get("block_size"))


def _checked(path: str | Path, tensors: dict[str, Tensor], facts: Any) -> dict[str, Tensor]:
    require(
        isinstance(facts, dict) and tensors.keys() == _KINDS.keys(),
        f"{path} must hold the tensors {sorted(_KINDS)} and facts of an evaluation, has "
        f"{sorted(tensors)}; evaluate with evaluate.records to make it",
    )
    rounds = len(tensors["accepted"])
    slots = tensors["confidence_logits"].shape[-1]
    for name, (dims, dtype) in _KINDS.items():
        tensor, shape = tensors[name], (rounds, slots)[:dims]
        require(
            tensor.dtype == dtype and tuple(tensor.shape) == shape,
            f"{name} in {path} must be {dtype} {list(shape)}, is {tensor.dtype} "
            f"{list(tensor.shape)}",
        )
    proposed, accepted = tensors["proposed"], tensors["accepted"]
    require(
        bool(((0 <= accepted) & (accepted <= proposed) & (proposed <= slots)).all()),
        f"{path} must have 0 <= accepted <= proposed <= {slots} in every round",
    )
    require(rounds > 0, f"{path} has no rounds; evaluate more prompts or longer answers")
    return tensors
