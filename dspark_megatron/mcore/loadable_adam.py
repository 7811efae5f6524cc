"""AdamW that Megatron-Core's distributed optimizer can load back.

Without Apex or Transformer Engine Megatron-Core uses PyTorch's AdamW, which keeps one `step` per
parameter; loading a distributed checkpoint needs the layout of the other two, one per group. This
holds on any device.
"""

from typing import Any

import torch
from torch.optim.adamw import adamw


def install() -> None:
    """Put AdamW where Megatron-Core looks for Apex's, if it found neither Apex nor TE."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distributed_optimizer.Adam = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.HAVE_APEX_OR_TE = True
    distributed_optimizer.USING_APEX_OPTIMIZER = True


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; one `step` per parameter group, as Apex and TE have it."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        **_unused: Any,  # capturable and the like: choices between CUDA kernels
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (adam_w_mode=True) is supported")
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            before = int(group.get("step", 0))
            group["step"] = before + 1  # on all ranks, also where one has no part of the group
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group, before)

    def _update(
        self, parameters: list[torch.Tensor], group: dict[str, Any], steps_before: int
    ) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        device = parameters[0].device
        steps = torch.full((len(parameters),), float(steps_before), device=device)
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(steps.unbind()),
            foreach=False,
            fused=device.type == "cuda",  # one kernel where PyTorch's other forms take seven
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
