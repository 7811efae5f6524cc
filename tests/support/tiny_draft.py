"""A tiny draft, data and target states for tests of parallel code, and gathering over ranks."""

import contextlib
from dataclasses import dataclass
from unittest import mock

import torch

from dspark_megatron.config import LossConfig, OptimizerConfig
from dspark_megatron.targets.base import StatesSource, TargetStates

NUM_ANCHORS = 5


@dataclass
class Samples:
    """Unpadded samples with the target's states, as a cache would hold them."""

    input_ids: list
    loss_masks: list
    anchors: list
    taps: list
    last_hidden: list


def make_samples(shape, lengths=(20, 13, 17, 9), seed=3, loss=None):
    """Anchors follow the rules of `loss` (default: the defaults)."""
    from dspark_megatron.data.blocks import sample_anchors

    loss = loss or LossConfig()
    generator = torch.Generator().manual_seed(seed)
    m = len(shape.target_layer_ids)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    masks = [torch.rand(n, generator=generator) > 0.25 for n in lengths]
    return Samples(
        input_ids=[torch.randint(0, 60, (n,), generator=generator) for n in lengths],
        loss_masks=masks,
        anchors=[sample_anchors(mask, NUM_ANCHORS, i, loss) for i, mask in enumerate(masks)],
        taps=[normal(n, m * shape.hidden_size) for n in lengths],
        last_hidden=[normal(n, shape.hidden_size) for n in lengths],
    )


class CachedStates(StatesSource):
    """A target whose states were computed before: finds a sample's by its tokens."""

    lockstep = False

    def __init__(self, samples, device="cpu"):
        self.samples, self.device = samples, device

    def states(self, batch):
        rows = []
        for row in batch.input_ids.cpu():
            index = next(
                i
                for i, ids in enumerate(self.samples.input_ids)
                if torch.equal(row[: len(ids)], ids)
            )
            pad = (0, 0, 0, len(row) - len(self.samples.input_ids[index]))
            rows.append(
                [
                    torch.nn.functional.pad(x[index], pad)
                    for x in (self.samples.taps, self.samples.last_hidden)
                ]
            )
        return TargetStates(*(torch.stack(x).to(self.device) for x in zip(*rows, strict=True)))


def target_head(shape):
    """The target's embedding and LM head, [v, h] each."""
    generator = torch.Generator().manual_seed(11)
    size = (shape.vocab_size, shape.hidden_size)
    return [torch.randn(size, generator=generator) * 0.3 for _ in range(2)]


def build_tiny_draft(runtime, shape, dtype=torch.float32, **options):
    from dspark_megatron.model.draft_model import DSparkDraftModel

    model = DSparkDraftModel(
        shape,
        tp_group=runtime.tp_group,
        params_dtype=dtype,
        device=runtime.device,
        attention_group_size=2,
        **options,
    )
    model.init_weights(seed=5, std=0.2)
    split = {name for name, (dim, _) in layout_of(model).items() if dim == 0}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases away from their special values
            noise = torch.Generator().manual_seed(sum(map(ord, name)))
            parts = runtime.tp_group.size() if name in split else 1
            whole = 0.1 * torch.randn(parts * len(parameter), generator=noise)
            with torch.no_grad():
                parameter += whole.chunk(parts)[runtime.tp_group.rank() % parts].to(parameter)
    shard = model.vocab_shard
    rows = []
    for matrix in target_head(shape):
        local = torch.zeros(shard.vocab_end_index - shard.vocab_start_index, matrix.shape[1])
        part = matrix[shard.vocab_start_index : shard.vocab_end_index]
        local[: len(part)] = part
        rows.append(local)
    model.load_frozen_replicas(*rows)
    return model


def make_step(runtime, model, samples, loss=None):
    from dspark_megatron.mcore.optimizer import wrap_data_parallel
    from dspark_megatron.training.step import GradientStep

    wrapped = wrap_data_parallel(model, OptimizerConfig(use_distributed_optimizer=False))
    return GradientStep(
        loss or LossConfig(chunk_rows=4),
        wrapped,
        CachedStates(samples, runtime.device),
        tp_group=runtime.tp_group,
        dp_group=runtime.dp_group,
        device=runtime.device,
    )


@contextlib.contextmanager
def one_collective_at_a_time():
    """Megatron-Core reduces buckets in coalesced collectives, of which PyTorch has no form for meta
    tensors, nor gloo for CUDA ones."""
    from megatron.core.distributed import param_and_grad_buffer

    def apart(*_, **__):
        return contextlib.nullcontext(mock.Mock())

    with mock.patch.object(param_and_grad_buffer, "_coalescing_manager", apart):
        yield


def rank_micro_batches(runtime, samples, num_draft_tokens, micro_batch_size, loss=None, reach=None):
    """This data-parallel rank's share of all samples as one step."""
    from dspark_megatron.data.batch import MicroBatch
    from dspark_megatron.data.blocks import draft_blocks

    stride = micro_batch_size * runtime.dp_group.size()
    first = runtime.dp_group.rank() * micro_batch_size
    out = []
    for start in range(first, len(samples.input_ids), stride):
        part = slice(start, start + micro_batch_size)
        ids, masks = samples.input_ids[part], samples.loss_masks[part]
        anchors = samples.anchors[part]
        blocks = draft_blocks(
            ids, masks, anchors, num_draft_tokens, loss or LossConfig(), reach=reach
        )
        out.append(MicroBatch.of(ids, blocks))
    return out


def layout_of(model):
    """How each trained parameter is split: name -> (dim or None, stride)."""
    return {
        name: (p.partition_dim, p.partition_stride)
        if getattr(p, "tensor_model_parallel", False)
        else (None, 1)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assemble(shards, layout):
    """Whole tensors from each tensor-parallel rank's {name: tensor}."""
    whole = {}
    for name, (dim, stride) in layout.items():
        parts = [shard[name] for shard in shards]
        if dim is None:
            for part in parts[1:]:
                torch.testing.assert_close(part, parts[0], rtol=1e-5, atol=1e-6)
            whole[name] = parts[0]
            continue
        split = [part.chunk(stride, dim=dim) for part in parts]
        whole[name] = torch.cat([s[i] for i in range(stride) for s in split], dim=dim)
    return whole


def sample_logits(draft, taps, ids, anchors, *, trimmed=True):
    """A fully supervised sample's blocks: hidden states [n, k, h], this rank's logits
    [n, k, v/tp], confidence logits [n, k]. trimmed: without context outside of all windows."""
    from dspark_megatron.data.blocks import draft_blocks

    mask = torch.ones(1, len(ids), dtype=torch.bool)
    reach = draft.shape.attention.reach(draft.shape.num_layers) if trimmed else None
    blocks = draft_blocks(ids[None], mask, [anchors], draft.shape.num_draft_tokens, reach=reach)
    with torch.no_grad():
        out = draft(taps[None], blocks.to(taps.device))
        latents = None if out.latents is None else out.latents.flatten(0, 1)
        logits = draft.draft_logits(out.hidden.flatten(0, 1), latents)
        logits = logits.view(*out.hidden.shape[:2], -1)
    return out.hidden, logits, out.confidence_logits
