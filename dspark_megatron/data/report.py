"""What a run would train on, in figures: lengths, supervised tokens, anchors, padding."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dspark_megatron.config import Config, LossConfig
from dspark_megatron.data.blocks import anchor_candidates
from dspark_megatron.data.conversation import Sample
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.data.sampler import Blend, sample_at

PERCENTILES = (0, 10, 50, 90, 99, 100)


def describe_data(config: Config, dataset: ConversationDataset) -> str:
    """Lines of figures. Anchors and micro-batches are those of the config; nothing is trained."""
    num_anchors = config.model.num_anchors
    counts = torch.tensor([_counts(dataset[i], config.loss) for i in range(len(dataset))])
    lengths, loss_tokens, candidates = counts.unbind(1)
    rows = {
        "tokens": lengths,
        "supervised tokens": loss_tokens,
        "candidate anchors": candidates,
    }
    drawn, padding = candidates.clamp(max=num_anchors), padding_share(config, dataset, lengths)
    return "\n".join(
        [
            dataset.report.describe(),
            *_source_lines(config, dataset),
            " ".join([f"{'of a sample':<18}", *(f"{p:>8}%" for p in PERCENTILES), f"{'mean':>9}"]),
            *(_percentile_line(name, counts) for name, counts in rows.items()),
            f"anchors: {int(drawn.sum()):,} of {int(candidates.sum()):,} candidates are drawn when "
            f"each sample is used once (model.num_anchors {num_anchors})",
            f"padding: {padding:.1%} of the tokens in micro-batches of "
            f"{config.train.micro_batch_size}",
        ]
    )


def _counts(sample: Sample, loss: LossConfig) -> tuple[int, int, int]:
    """Tokens, supervised ones, candidate anchors."""
    mask = sample.loss_mask
    return len(mask), int(mask.sum()), anchor_candidates(mask, loss).numel()


def _percentile_line(name: str, counts: Tensor) -> str:
    """The least count that so many of a hundred samples do not exceed, and the mean."""
    ordered = counts.sort().values
    places = [max(0, -(-p * len(ordered) // 100) - 1) for p in PERCENTILES]
    figures = " ".join(f"{int(ordered[place]):>9,}" for place in places)
    return f"{name:<18} {figures} {counts.double().mean():>9,.1f}"


def _source_lines(config: Config, dataset: ConversationDataset) -> Iterator[str]:
    if dataset.shares is None:
        return
    for entry, size, places in zip(config.data.train_files, *dataset.shares, strict=True):
        yield f"{entry}: {size:,} samples, {places:,} in an epoch ({places / size:.2f} times each)"


def padding_share(config: Config, dataset: ConversationDataset, lengths: Tensor) -> float:
    """Padded tokens among all that the micro-batches of the first epoch have; lengths: [n]."""
    count, size = len(dataset), config.train.micro_batch_size
    blend = Blend(dataset.shares, config.train.seed) if dataset.shares else None
    refs = [sample_at(position, count, config.train.seed) for position in range(count)]
    used = [blend(ref) if blend else ref for ref in refs]
    order = lengths[torch.tensor([ref.sample_index for ref in used])]
    whole = [part for part in order.split(size) if len(part) == size or count < size]
    padded = sum(len(part) * int(part.max()) for part in whole)
    return 1 - sum(int(part.sum()) for part in whole) / padded
