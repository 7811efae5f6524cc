"""Logits and confidence of a draft folder against those of the checkpoint it was exported from.

Both sides are run by this project's model in fp32, each built from what its own files say: shape
from the folder's config or the checkpoint's, embedding and LM head from the folder or the target.
It holds one whole draft at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.draft_tensors import fill_draft
from dspark_megatron.conversion.layouts.names import EMBEDDING, LM_HEAD
from dspark_megatron.conversion.sources import CheckpointSource
from dspark_megatron.data.blocks import draft_blocks
from dspark_megatron.model.draft_model import FROZEN_REPLICAS, DSparkDraftModel
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.target_weights import shared_matrices

TOKENS = 24
"""Context of the fixed input."""


@dataclass(frozen=True)
class Difference:
    """Of the two sides' numbers on a fixed input."""

    name: str
    largest_difference: float
    standard_deviation: float
    """Of the numbers themselves."""

    def __str__(self) -> str:
        return (
            f"{self.name} on a fixed input: largest difference to the checkpoint's "
            f"{self.largest_difference:.3g}, standard deviation {self.standard_deviation:.3g}"
        )


def compare_logits(
    folder: DraftFolder,
    source: CheckpointSource,
    target_dir: str,
    *,
    tp_group: dist.ProcessGroup,
    target_checkpoint: str | Path = "",
) -> list[Difference]:
    """Of the logits, and of the confidence where there is a head. tp_group: of one rank."""
    matrices = shared_matrices(target_dir, target_checkpoint)
    target = dict(zip((EMBEDDING, LM_HEAD), matrices, strict=True))

    def of_target(name: str) -> Tensor:
        return target[name].tensor()

    def of_folder(name: str) -> Tensor:
        return folder.tensor(name) if name in folder.shared else of_target(name)

    def from_checkpoint(draft: DSparkDraftModel) -> None:
        for name, parameter in draft.named_parameters():
            if not name.startswith(FROZEN_REPLICAS):  # on one rank the vocabulary has no padding
                parameter.copy_(source.reader.tensor(name)[: len(parameter)])

    def from_folder(draft: DSparkDraftModel) -> None:
        fill_draft(draft, folder.tensor, tp_group=tp_group)

    theirs = _results(source.description.shape, from_checkpoint, of_target, tp_group)
    ours = _results(folder.shape, from_folder, of_folder, tp_group)
    return [
        Difference(name, (found - wanted).abs().max().item(), wanted.std().item())
        for (name, found), (_, wanted) in zip(ours, theirs, strict=True)
    ]


@torch.no_grad()
def _results(
    shape: DraftShape,
    fill: Callable[[DSparkDraftModel], None],
    shared: Callable[[str], Tensor],
    tp_group: dist.ProcessGroup,
) -> list[tuple[str, Tensor]]:
    """Logits [n * d, v], and confidence logits [n, d] where there is a head."""
    draft = DSparkDraftModel(
        shape, tp_group=tp_group, params_dtype=torch.float32, device=torch.device("cpu")
    )
    fill(draft)
    draft.load_frozen_replicas(shared(EMBEDDING), shared(LM_HEAD))
    return list(_forward(draft.eval()))


def _forward(draft: DSparkDraftModel) -> Iterator[tuple[str, Tensor]]:
    shape = draft.shape
    generator = torch.Generator().manual_seed(0)
    width = len(shape.target_layer_ids) * shape.hidden_size
    taps = torch.randn(1, TOKENS, width, generator=generator)
    size = (TOKENS + 1 + shape.num_draft_tokens,)
    ids = torch.randint(0, shape.vocab_size, size, generator=generator)
    anchors = torch.tensor([1, TOKENS // 2, TOKENS])
    blocks = draft_blocks([ids], [torch.ones_like(ids)], [anchors], shape.num_draft_tokens)
    out = draft(taps, blocks)
    latents = None if out.latents is None else out.latents.flatten(0, 1)
    yield "logits", draft.draft_logits(out.hidden.flatten(0, 1), latents)
    if out.confidence_logits is not None:
        yield "confidence", out.confidence_logits
