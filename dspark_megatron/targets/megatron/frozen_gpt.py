"""A frozen GPTModel, or a pipeline stage of one, that gives hidden states instead of logits."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from dspark_megatron.errors import require


class FrozenGPT:
    """What providers of whole models and of stages have in common."""

    def __init__(
        self,
        model: GPTModel,
        target_layer_ids: tuple[int, ...],
        *,
        with_last_hidden: bool,
        with_output_layer: bool,
    ) -> None:
        """with_last_hidden: false keeps no decoder layer above the last tap. with_output_layer:
        false frees what only `own_logits` needs."""
        require(
            not getattr(model.config, "use_mup", False),
            "a GPTModel with use_mup scales its logits by mup_output_mult, and this project makes "
            "the logits of a GPTModel without a scale; take a target without use_mup",
        )
        self.model = model.eval().requires_grad_(False)
        self.model.post_process = False  # the forward pass then ends with the final norm
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._shape_group = shape_group(model)
        if not with_last_hidden:
            layers, last = model.decoder.layers, max(target_layer_ids)
            del layers[sum(layer.layer_number - 1 <= last for layer in layers) :]
        if not (with_last_hidden and with_output_layer):
            model.output_layer = None
        self._taps = Taps(model, target_layer_ids)


def output_logits(model: GPTModel, hidden: Tensor) -> Tensor:
    """Of the output layer: [s, b, h], or [s/tp, b, h] with sequence parallelism -> [b, s, v], all
    columns on every rank."""
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else None
    logits, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=True)
    return logits.transpose(0, 1)


def shape_group(model: GPTModel) -> dist.ProcessGroup | None:
    """The ranks whose tokens meet in the experts, which must be equally many on each; None where
    these are the tensor-parallel ranks, with the same tokens anyway."""
    if model.config.num_moe_experts is None:
        return None
    own, tp = model.pg_collection.tp_ep, model.pg_collection.tp
    ranks = dist.get_process_group_ranks
    return None if set(ranks(own)) <= set(ranks(tp)) else own


class Taps:
    """Keeps the outputs of this pipeline stage's layers among `target_layer_ids`."""

    def __init__(self, model: GPTModel, target_layer_ids: Sequence[int]) -> None:
        """target_layer_ids: numbers in the whole model, 0-based."""
        self.ids: list[int] = []
        """Those of this stage, ascending."""
        self._kept: dict[int, Tensor] = {}
        for layer in model.decoder.layers:
            layer_id = layer.layer_number - 1
            if layer_id in target_layer_ids:
                self.ids.append(layer_id)
                layer.register_forward_hook(self._keeper(layer_id))

    def take(self) -> list[Tensor]:
        """Outputs of the last forward pass in the order of `ids`, each [s, b, h], or [s/tp, b, h]
        with sequence parallelism."""
        return [self._kept.pop(layer_id) for layer_id in self.ids]

    def _keeper(self, layer_id: int) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            # Layers after a stage's first ask for gradients even where nothing is to be learnt.
            self._kept[layer_id] = output[0].detach()

        return keep


def whole_rows(model: GPTModel, hidden: Tensor) -> Tensor:
    """[s, b, x], or [s/tp, b, x] with sequence parallelism -> [b, s, x]. One all-gather with
    sequence parallelism, else none."""
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=model.pg_collection.tp
        )
    return hidden.transpose(0, 1).contiguous()
