"""AdamW that Megatron-Core's distributed optimizer can load back.

Without Apex or Transformer Engine Megatron-Core uses PyTorch's AdamW, which keeps one `step` per
parameter; loading a distributed checkpoint needs the layout of the other two, one per group. This
holds on any device.
"""

from typing import Any

import torch


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
            group["step"] = step = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, step)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], step: int) -> None:
        (beta1, beta2), grad, state = group["betas"], parameter.grad, self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**step))
