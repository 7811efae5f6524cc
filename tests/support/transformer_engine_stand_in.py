"""Megatron-Core's wrappers of Transformer Engine as plain PyTorch, to build and run the layer spec
where Transformer Engine cannot be: the same arguments, parameter names, collectives and marks.

What it cannot show: the kernels, fp8, and anything that Transformer Engine does otherwise on a GPU.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class TENorm:
    def __new__(cls, config, hidden_size, eps=1e-5):
        norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm


class _Linear(torch.nn.Module):
    """weight [out, in] of this rank; the state of fp8 kernels is there and empty."""

    def __init__(self, config, size, dim, stride, tp_group, bias=False):
        super().__init__()
        self.config, self.tp_group, self.dim = config, tp_group, dim
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, dim, stride)
        self.bias = None
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(size[0], dtype=config.params_dtype))
            if dim == 1:
                self.bias.sequence_parallel = config.sequence_parallel

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state): ...

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        groups = dict(tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {"weight": 0, "bias": 0} if self.dim == 0 else {"weight": 1}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)


class TELinear(_Linear):
    def __init__(
        self,
        input_size,
        output_size,
        *,
        parallel_mode,
        config,
        init_method,
        bias,
        skip_bias_add,
        skip_weight_param_allocation,
        tp_comm_buffer_name=None,
        is_expert=False,
        symmetric_ar_type=None,
        tp_group=None,
    ):
        assert parallel_mode == "duplicated" and tp_group is None
        super().__init__(config, (output_size, input_size), 0, 1, None, bias)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias), None


class TERowParallelLinear(_Linear):
    def __init__(
        self,
        input_size,
        output_size,
        *,
        config,
        init_method,
        bias,
        input_is_parallel,
        skip_bias_add,
        is_expert,
        tp_comm_buffer_name=None,
        tp_group=None,
        name=None,  # from Megatron-Core 0.19 on
    ):
        assert input_is_parallel
        size = (output_size, input_size // tp_group.size())
        super().__init__(config, size, 1, 1, tp_group, bias)

    def forward(self, x):
        leave = reduce_from_tensor_model_parallel_region
        if self.config.sequence_parallel:
            leave = reduce_scatter_to_sequence_parallel_region
        out = leave(F.linear(x, self.weight), group=self.tp_group)
        return (out if self.bias is None else out + self.bias), None


class TELayerNormColumnParallelLinear(_Linear):
    def __init__(
        self,
        input_size,
        output_size,
        *,
        config,
        init_method,
        gather_output,
        bias,
        skip_bias_add,
        is_expert,
        skip_weight_param_allocation=False,
        tp_comm_buffer_name=None,
        tp_group=None,
        name=None,  # from Megatron-Core 0.19 on
        stride=1,
    ):
        assert not gather_output and not bias
        size = (output_size // tp_group.size(), input_size)
        super().__init__(config, size, 0, stride, tp_group)
        weight = torch.ones(input_size, dtype=config.params_dtype)
        self.layer_norm_weight = torch.nn.Parameter(weight)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon)
        enter = copy_to_tensor_model_parallel_region
        if self.config.sequence_parallel:
            enter = gather_from_sequence_parallel_region
        return F.linear(enter(normed, group=self.tp_group), self.weight), None
