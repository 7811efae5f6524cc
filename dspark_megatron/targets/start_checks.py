"""Checks of the loaded target on its first samples: the logits that the loss makes are its own,
packed samples stay apart, and a text in pieces has the states of the whole text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from dspark_megatron.data.batch import Batch, padded
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.ops.logit_transform import TargetHead
from dspark_megatron.ops.vocab_parallel import VocabShard
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.base import DecodingTarget, TargetStates
from dspark_megatron.targets.family import without_layers
from dspark_megatron.targets.huggingface.packing import PackedSequences
from dspark_megatron.targets.huggingface.quiet import quiet_transformers
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget, layer_output

_HEAD_TOKENS = 16
"""Of the sample whose logits are compared."""
_PACKED_TOKENS = 512
"""Of a packed sample, at most: a packed sequence and its mask stay small."""
_PIECES = ((0, 16, 0), (16, 17, 4), (17, 24, 2), (24, 25, 0), (25, 48, 1))
"""Of a text that comes in pieces: first token, end, and drafts that are rejected after it."""


@torch.no_grad()
def check_target_logits(
    target: Any,
    folder: str | Path,
    head: TargetHead,
    shard: VocabShard,
    input_ids: Tensor,
) -> None:
    """Compare the logits that we make from the last hidden states, with the scale and the soft cap
    that the target's config says, with the target's own: a GPTModel's are those of its output layer
    (`own_logits`), any other's those of the family's own language-model class.

    Transformers loads that class from the same folder with no decoder layer, and it turns the split
    target's last layer output into logits: so wrong rows of the head, a head with a bias, another
    logit scale or soft cap, and a final norm that is missing or doubled all show. Costs the
    embedding and the head, whole, in host memory while it runs. input_ids [1, s], alike on every
    tensor-parallel rank; each compares its own columns, without a collective of ours.
    Raises ConfigError when they differ by more than rounding.
    """
    input_ids = input_ids[:1, :_HEAD_TOKENS]
    if isinstance(target, HuggingFaceTarget):
        last_layer, last_hidden = _last_states(target, input_ids)
        causal = _without_layers(folder, target.dtype)
        own = causal(inputs_embeds=last_layer.cpu(), use_cache=False).logits
    else:
        own, last_hidden = target.own_logits(input_ids)
    own = own.float().cpu()
    ours = head.logits(last_hidden).float().cpu()
    real = slice(shard.vocab_start_index, min(shard.vocab_end_index, shard.vocab_size))
    own = own[..., real]
    difference = (own - ours[..., : own.shape[-1]]).abs().amax().item() if own.numel() else 0.0
    scale = own.abs().amax().item() if own.numel() else 0.0
    # bf16 rounds hidden states and logits to 2^-8 of themselves; fp32 differs by summation order.
    exact = {head.weight.dtype, target.dtype} == {torch.float32}
    if not difference <= (1e-4 if exact else 0.02) * max(scale, 1.0):
        raise ConfigError(
            f"the target's own logits are not {head.transform.describe()} of its last hidden "
            f"states: they differ by {difference:.3g} (largest logit {scale:.3g}). A bias in its "
            "head, or a scale or soft cap that its config does not say or its class does not "
            "apply, is not supported; else its final norm or head was not loaded right"
        )


def _last_states(target: HuggingFaceTarget, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the last decoder layer and of the final norm, each [1, s, h]."""
    kept = []
    hook = target.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: kept.append(layer_output(output))
    )
    states = target.states(Batch(input_ids))
    hook.remove()
    # In several passes it comes in pieces, and what follows them is another rank's need of passes.
    return torch.cat(kept, dim=1)[:, : input_ids.shape[1]], states.hidden


def _without_layers(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The language-model class with embedding, final norm and head only, on the CPU."""
    config = without_layers(load_target_config(folder))
    is_text_only = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    family = AutoModelForCausalLM if is_text_only else AutoModelForImageTextToText
    with quiet_transformers():  # every layer's tensors are reported as unexpected
        return family.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager",
        ).eval()


@torch.no_grad()
def check_packing(target: HuggingFaceTarget, samples: Sequence[Tensor]) -> None:
    """Compare the states of packed samples [s] with those of each alone; every rank calls it with
    the same ones. Of at least two, the first two share a sequence and the others another,
    beside it where attention takes a mask. A window of attention longer than they is not seen.

    Raises ConfigError when they differ by more than rounding.
    """
    packer = target.packer
    assert packer is not None
    allowed = packer.max_tokens or len(samples) * _PACKED_TOKENS
    most = min(_PACKED_TOKENS, allowed // len(samples))
    ids = [sample[: max(1, most)] for sample in samples]
    batch = Batch(padded(ids), [len(one) for one in ids])
    packed = _whole(target.packed_states(batch, _sequences(ids, packer.has_masks)))
    differences = [
        mean_distance(packed[i, : len(one)], _whole(target.states(Batch(one[None])))[0])
        for i, one in enumerate(ids)
    ]
    tolerance = rounding_of(target.model.dtype)
    require(
        max(differences) <= tolerance,
        f"the target's family ({target.model.config.model_type}) does not keep samples of a packed "
        f"sequence apart with target.attention {target.model.config._attn_implementation!r}: "
        f"states of sample {differences.index(max(differences))} of it differ by "
        f"{max(differences):.2g} of their norm from those of the sample alone (at most "
        f"{tolerance:g} may be rounding); set target.packing=false, and "
        "data.group_by_length=true for less padding",
    )


def _sequences(ids: list[Tensor], side_by_side: bool) -> list[PackedSequences]:
    sequences = [[0, 1], list(range(2, len(ids)))] if len(ids) > 2 else [[0, 1]]
    groups = [sequences] if side_by_side else [[one] for one in sequences]
    return [
        PackedSequences(group, max(sum(len(ids[i]) for i in one) for one in group))
        for group in groups
    ]


def _whole(states: TargetStates) -> Tensor:
    """Taps and last hidden state side by side."""
    parts = [states.taps] if states.last_hidden is None else [states.taps, states.last_hidden]
    return torch.cat(parts, dim=-1).float()


def rounding_of(dtype: torch.dtype) -> float:
    """The most that `mean_distance` may be. A sum in another order moves fp32 by 1e-6, bf16 by some
    1e-2; a mistake, most tokens by far more."""
    return 1e-3 if dtype == torch.float32 else 0.05


def mean_distance(packed: Tensor, alone: Tensor) -> float:
    """Mean over tokens of the distance in units of the norm, NaN as infinite. Not of the whole: the
    states of a first token may be a thousand times larger than the others'. Both [s, x]."""
    mean = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).mean().item()
    return mean if mean == mean else float("inf")


@torch.no_grad()
def check_pieces_agree(target: DecodingTarget, input_ids: Tensor) -> None:
    """Compare last hidden states [1, s, h] of a prompt, taken in as decoding does, with those of
    one pass. input_ids [1, s >= 1], alike on every tensor-parallel rank. Costs six short passes.
    Raises ConfigError when they differ by more than rounding."""
    length = _PIECES[-1][1]
    ids = input_ids.repeat(1, -(-length // input_ids.shape[1]))[:, :length].to(target.device)
    cache, found = target.new_cache(), []
    for start, end, drafts in _PIECES:
        own = ids[:, start:end]
        if start == 0:
            found.append(target.add_sequence(own, cache).hidden)
            continue
        tokens = torch.cat([own, ids[:, :drafts]], dim=1)
        found.append(target.extend(tokens, cache).hidden[:, : end - start])
        target.forget(cache, [drafts])
    whole = target.states(Batch(ids)).hidden
    difference = mean_distance(torch.cat(found, dim=1)[0].float(), whole[0].float())
    most = rounding_of(target.dtype)
    require(
        difference <= most,
        "decoding with this target would not be lossless: states of a text that comes in pieces, "
        f"with drafts taken back, differ by {difference:.2g} of their norm from those of the whole "
        f"text (at most {most:g} may be rounding). Its family does not go on from its cache as "
        "it should in this version of Transformers: take another version, or evaluate in a "
        "serving engine",
    )
