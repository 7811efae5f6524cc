"""Outputs of decoder layers of a GPTModel, kept by forward hooks."""

from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


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
