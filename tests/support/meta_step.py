"""The real training step with everything that belongs on the accelerator on the meta device.

The host holds real tensors, so whatever the host would have to wait for, or would hand to a kernel
of the device without a transfer, is an error here as it would be slow (or wrong) on a GPU.
"""

from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dspark_megatron.config import LossConfig, OptimizerConfig
from dspark_megatron.planning.on_paper.ranks import META, EverythingOnMeta, runtime_on_paper
from dspark_megatron.targets.base import StatesSource, TargetStates
from support.tiny_draft import make_samples, rank_micro_batches


class DeviceDiscipline(TorchDispatchMode):
    """Refuses an operation that mixes tensors of the host and of the device, unless it is the
    transfer itself; counts the transfers to the device."""

    TRANSFERS = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __init__(self):
        super().__init__()
        self.transfers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {tensor.device.type for tensor in given}
        transfers = function in self.TRANSFERS
        if len(places) > 1 and not transfers:
            raise AssertionError(f"{function} mixes tensors of host and device: {given}")
        out = function(*args, **(kwargs or {}))
        self.transfers += transfers and "cpu" in places and out.device == META
        return out


class MetaTarget(StatesSource):
    """States as a target leaves them: on the device."""

    lockstep = False

    def __init__(self, shape, dtype):
        self.widths = len(shape.target_layer_ids) * shape.hidden_size, shape.hidden_size
        self.dtype = dtype

    def states(self, batch):
        made = (
            torch.empty(*batch.input_ids.shape, w, dtype=self.dtype, device=META)
            for w in self.widths
        )
        return TargetStates(*made)


def step_on_meta(shape, tp, *, loss=None, dtype=torch.bfloat16, **options):
    """One step of two micro-batches, with as many data-parallel ranks: the model, its gradients by
    parameter, and the discipline that watched the step."""
    from dspark_megatron.mcore.optimizer import wrap_data_parallel
    from dspark_megatron.model.draft_model import DSparkDraftModel
    from dspark_megatron.training.metrics import MetricSums
    from dspark_megatron.training.step import GradientStep

    loss = loss or LossConfig(chunk_rows=8)
    with runtime_on_paper(tp, 2 * tp) as runtime, EverythingOnMeta():
        groups = dict(tp_group=runtime.tp_group)
        with META:
            model = DSparkDraftModel(shape, **groups, params_dtype=dtype, device=META, **options)
            wrapped = wrap_data_parallel(model, OptimizerConfig())
        # Megatron's look for NaN waits for the device, once a bucket: docs/performance.md says so.
        wrapped.ddp_config.check_for_nan_in_grad = False
        groups |= dict(dp_group=runtime.dp_group, device=META)
        step = GradientStep(loss, wrapped, MetaTarget(shape, dtype), **groups)
        samples = make_samples(shape, lengths=(20, 13) * runtime.dp_group.size())
        reach = shape.attention.reach(shape.num_layers)
        drafted = shape.num_draft_tokens
        micro_batches = rank_micro_batches(runtime, samples, drafted, 1, loss, reach)
        metrics = MetricSums.zeros(drafted, META)
        step.run(micro_batches, metrics)  # a run's first call may move what it then keeps
        gradients = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(gradients[name].append)
        with DeviceDiscipline() as discipline:
            step.run(micro_batches, metrics)
    return model, gradients, discipline
