"""Provider `huggingface`: any causal LM, split by Transformers' native tensor parallelism."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoModel, DynamicCache, PreTrainedModel

from dspark_megatron.config import TargetConfig
from dspark_megatron.data.batch import Batch
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.ops.transfer import to_device
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.base import Target, TargetStates
from dspark_megatron.targets.huggingface.kv_cache import SequenceCache
from dspark_megatron.targets.huggingface.packing import PackedSequences, SequencePacker, unpacked
from dspark_megatron.targets.huggingface.split import TargetSplit
from dspark_megatron.targets.passes import Sequences, joined, run_in_step, states_in_passes


class HuggingFaceTarget(Target):
    """A base model (no LM head) whose decoder layers are tapped by forward hooks."""

    def __init__(
        self,
        config: TargetConfig,
        target_layer_ids: tuple[int, ...],
        *,
        split: TargetSplit,
        dp_group: dist.ProcessGroup | None,
        device: torch.device,
        with_last_hidden: bool = True,
        model: PreTrainedModel | None = None,
    ) -> None:
        """dp_group: the data-parallel ranks, of which some may share the target's weights.
        with_last_hidden: false keeps no decoder layer above the last tap, and states then lack the
        last hidden state; for objectives that do not compare with the target. model: this rank's
        part of it; None loads it."""
        self.model = load_base_model(config, split) if model is None else model
        self.model.to(device).eval().requires_grad_(False)
        self.lockstep = split.lockstep
        self.device, self.dtype = device, self.model.dtype
        self._dp_group = dp_group
        self._max_tokens = config.max_tokens_per_forward
        hidden_size = self.model.config.get_text_config().hidden_size
        self.packer = SequencePacker.of(config, hidden_size) if config.packing else None
        self._ids = target_layer_ids
        self._tapped: dict[int, Tensor] = {}
        self.layers = decoder_layers(self.model)
        self._with_last_hidden = with_last_hidden
        if not with_last_hidden:
            # Every family runs the layers that the list has, whatever its config says.
            del self.layers[max(target_layer_ids) + 1 :]
        for layer_id in target_layer_ids:
            self.layers[layer_id].register_forward_hook(self._keeper(layer_id))

    def states(self, batch: Batch) -> TargetStates:
        if self.packer is not None and batch.lengths is not None and len(batch.lengths) > 1:
            return self.packed_states(batch, self.packer.groups(batch.lengths))
        if self._max_tokens is None:
            states = self._run(batch.input_ids, use_cache=False)
        else:
            states = states_in_passes(
                to_device(batch.input_ids, self.device),
                self._max_tokens,
                self._run_pieces,
                lockstep_group=self._lockstep_group,
            )
        return replace(states, positions=batch.input_ids.numel())

    def packed_states(self, batch: Batch, groups: list[PackedSequences]) -> TargetStates:
        """`states` with the samples packed so; 0 where input_ids is padding."""
        assert batch.lengths is not None
        input_ids = to_device(batch.input_ids, self.device)
        packed = [group.take(input_ids, batch.lengths) for group in groups]
        found = run_in_step(packed, self._run_pieces, lockstep_group=self._lockstep_group)
        return unpacked(found, groups, batch.lengths)

    @property
    def _lockstep_group(self) -> dist.ProcessGroup | None:
        """Of no use where every `states` is one pass."""
        return self._dp_group if self.lockstep and self._max_tokens is not None else None

    def new_cache(self) -> SequenceCache:
        return SequenceCache(self.model.config)

    def add_sequence(self, input_ids: Tensor, cache: SequenceCache) -> TargetStates:
        pieces = input_ids.split(self._max_tokens or input_ids.shape[1], dim=1)
        new = self.new_cache()
        new.lengths = [0]
        states = [self.extend(piece, new) for piece in pieces]
        self.forget(new, [0])
        cache.add(new)
        return joined(states, dim=1)

    def extend(self, input_ids: Tensor, cache: SequenceCache) -> TargetStates:
        tokens = input_ids.shape[1]
        cache.remember(input_ids)
        states = self._run(input_ids, **cache.arguments(tokens, self.device))
        cache.extended(tokens)
        return states

    def forget(self, cache: SequenceCache, tokens: list[int]) -> None:
        again = cache.forget(tokens)
        if again is not None:
            self.extend(again, cache)
            cache.forget([0])

    def keep(self, cache: SequenceCache, sequences: list[int]) -> None:
        cache.keep(sequences)

    def _run_pieces(self, group: Sequences) -> list[TargetStates]:
        if len(group.pieces) == 1:
            packed = {} if group.position_ids is None else {"position_ids": group.position_ids}
            return [self._run(group.pieces[0], use_cache=False, **packed)]
        cache = DynamicCache(config=self.model.config)
        return [self._run(piece, use_cache=True, past_key_values=cache) for piece in group.pieces]

    @torch.no_grad()
    def _run(self, input_ids: Tensor, **arguments: Any) -> TargetStates:
        output = self.model(input_ids=to_device(input_ids, self.device), **arguments)
        taps = torch.cat([self._tapped.pop(i) for i in self._ids], dim=-1)
        return TargetStates(taps, output.last_hidden_state if self._with_last_hidden else None)

    def _keeper(self, layer_id: int) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            self._tapped[layer_id] = layer_output(output)

        return keep


def load_base_model(config: TargetConfig, split: TargetSplit) -> PreTrainedModel:
    """This rank's part of the base model. ConfigError for weights that are missing or cannot be cut
    so: Transformers only warns of them, and leaves them random."""
    model, found = AutoModel.from_pretrained(
        config.path,
        config=load_target_config(config.path),  # else config.json may choose the attention
        dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        attn_implementation=config.attention,
        local_files_only=True,
        trust_remote_code=False,
        distributed_config=split.distributed_config(),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    _require_none(config.path, "lacks", found["missing_keys"])
    misfits = [entry[0] for entry in found["mismatched_keys"]]
    way_out = "; load it with fewer ways of splitting (parallel.*, target.shard_*)"
    _require_none(
        config.path, "has in another shape than this split of the model", misfits, way_out
    )
    return model


def _require_none(path: str, what: str, names: set[str] | list[str], way_out: str = "") -> None:
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    require(
        not names,
        f"the target's folder {path} {what} {len(names)} of the weights that Transformers "
        f"{transformers.__version__} expects ({shown}){way_out}",
    )


def layer_output(output: Any) -> Tensor:
    """The hidden states among what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The text model's list of decoder layers, wherever the family keeps it."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    if len(lists) != 1:
        raise ConfigError(
            f"cannot tell the {depth} decoder layers of {type(model).__name__} apart: "
            f"{len(lists)} module lists of its text model have that length"
        )
    return lists[0]
