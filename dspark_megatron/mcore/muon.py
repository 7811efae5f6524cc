"""Muon (`torch.optim.Muon`) for matrices that tensor-parallel ranks hold in parts.

Newton-Schulz iterations need the whole matrix, so each weight has an owner: the rank that has its
fp32 main weight and its momentum, whole, and takes the step. The others send it their part of the
gradient and get back their part of the new weight.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes
from torch import Tensor

from dspark_megatron.config import OptimizerConfig
from dspark_megatron.mcore.owned_weights import Owners, Weight
from dspark_megatron.mcore.parameter_rates import rates, scale_of

_MAIN, _MOMENTUM = "fp32_param", "momentum_buffer"


class MuonOptimizer(MegatronOptimizer):
    """A part of Megatron-Core's ChainedOptimizer, which takes the norm of all gradients, clips
    them and calls `step_with_ready_grads`.

    Its part of a checkpoint is whole matrices, each written by its owner, so it loads at any
    layout.
    """

    def __init__(
        self, config: OptimizerConfig, megatron_config: MegatronOptimizerConfig, model: Any
    ) -> None:
        """model: the data-parallel wrapper of a module with `split_matrices()`, whose gradients
        are whole on every data-parallel rank. With `use_distributed_optimizer` owners are spread
        over data-parallel ranks; else each of these takes all steps. Collectives: those of
        `reload_model_params`."""
        parameters = dict(model.module.named_parameters())
        splits = model.module.split_matrices()
        weights = [Weight(name, parameters[name], split) for name, split in splits.items()]
        self._dp_group, is_spread = model.dp_cp_group, config.use_distributed_optimizer
        self._is_copy = not is_spread
        self._parameters = {weight.name: weight.parameter.detach() for weight in weights}
        self.owners = Owners(
            weights, tp_group=model.tp_group, dp_group=self._dp_group if is_spread else None
        )
        self._gradients = {weight.name: _gradient(weight.parameter) for weight in weights}
        self.reload_model_params()
        self._own = [one for one in map(self.owners.own, self.owners.rounds) if one is not None]
        matrices = [matrix for weight in self._own for matrix in weight.matrices]
        optimizer = torch.optim.Muon(
            _groups(config, self._own, list(splits)),
            momentum=config.muon_momentum,
            ns_steps=config.muon_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        for matrix in matrices:
            optimizer.state[matrix][_MOMENTUM] = torch.zeros_like(matrix)
        super().__init__(optimizer, megatron_config)
        self.is_stub_optimizer = False

    @torch.no_grad()
    def reload_model_params(self, state_dict: Any = None) -> None:
        """Take the main weights from the parameters. Collectives: `Owners.gathered` a round."""
        for one in self.owners.rounds:
            whole = self.owners.gathered(one, lambda weight: weight.parameter.detach())
            if own := self.owners.own(one):
                own.matrices = own.matrices or [x.new_empty(x.shape).float() for x in whole]
                for matrix, value in zip(own.matrices, whole, strict=True):
                    matrix.copy_(value)

    def prepare_grads(self) -> bool:
        """Nothing to do: the step reads what Megatron-Core has reduced, in fp32."""
        return False

    def get_parameters(self) -> list[Any]:
        """What Megatron-Core takes the norm of and clips: all weights, on every rank."""
        return list(self._gradients.values())

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Collectives: `Owners.gathered` of fp32 gradients and `Owners.spread` a round."""
        for one in self.owners.rounds:
            whole = self.owners.gathered(one, lambda weight: weight.parameter.main_grad)
            if own := self.owners.own(one):
                for matrix, gradient in zip(own.matrices, whole, strict=True):
                    matrix.grad = gradient
            self.optimizer.step()  # of what has a gradient
            self.optimizer.zero_grad()
            self.owners.spread(one, own.matrices if own else [], self._parameters)
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: the gradient buckets are zeroed as for every optimizer."""

    def get_loss_scale(self) -> Tensor:
        return torch.ones(1)

    def step(self) -> Any:
        raise NotImplementedError("a ChainedOptimizer clips all gradients and takes the step")

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
    ) -> dict[str, Any]:
        """Whole matrices on their owners, and the group's settings for whoever reads them."""
        replica = self._dp_group.rank() if self._is_copy else 0
        groups = self.optimizer.param_groups
        tensors = {
            key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
            for key, tensor in self._tensors().items()
        }
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        return {"param_groups": settings, **tensors}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Tensors alone: the config rules the settings."""
        for key, tensor in self._tensors().items():
            tensor.copy_(state_dict[key])

    def _tensors(self) -> dict[str, Tensor]:
        """Main weight and momentum of each matrix that this rank owns, by name in a checkpoint."""
        found = {}
        for weight in self._own:
            for i, matrix in enumerate(weight.matrices):
                state = {_MAIN: matrix, _MOMENTUM: self.optimizer.state[matrix][_MOMENTUM]}
                for kind, tensor in state.items():
                    found[f"optimizer.state.{kind}.{weight.name}.{i}"] = tensor
        return found


def _gradient(parameter: Any) -> Tensor:
    """Stands for a parameter where norms are taken: its fp32 gradient as `.grad`, which one of bf16
    cannot have, and its place among tensor-parallel ranks."""
    stand_in = parameter.main_grad.detach()
    stand_in.grad = parameter.main_grad
    copy_tensor_model_parallel_attributes(stand_in, parameter)
    return stand_in


def _groups(config: OptimizerConfig, own: list[Weight], names: list[str]) -> list[dict[str, Any]]:
    """A group for each scale of the learning rate that any weight has: the same on every rank,
    with the matrices that this one owns."""
    found = []
    for scale in sorted({scale_of(config, name) for name in names}):
        weights = [weight for weight in own if scale_of(config, weight.name) == scale]
        matrices = [matrix for weight in weights for matrix in weight.matrices]
        found.append({"params": matrices, **_schedule(config, scale)})
    return found


def _schedule(config: OptimizerConfig, scale: float) -> dict[str, Any]:
    """What Megatron-Core's scheduler looks for in a group."""
    decay = config.weight_decay if config.muon_weight_decay is None else config.muon_weight_decay
    return dict(
        **rates(config, scale),
        wd_mult=1.0,
        start_wd=decay,
        end_wd=decay,
    )
