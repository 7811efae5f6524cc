"""Muon of a split draft is PyTorch's on whole matrices, and does not depend on the layout."""

from dataclasses import replace

import pytest
import torch

from dspark_megatron.config import OptimizerConfig
from support.shapes import GEMMA4, SHAPE, SHAPES

SETTINGS = dict(name="muon", lr=0.02, weight_decay=0.1, muon_weight_decay=0.3, clip_grad=0.0)
SHARED_HEADS = replace(SHAPES["gated"], num_key_value_heads=2)
"""Fewer key/value heads than the most ranks."""
STEPS = 3


def whole(shape, seed):
    """A value for each tensor of an export."""
    from dspark_megatron.conversion.layouts.names import hugging_face_shapes

    generator = torch.Generator().manual_seed(seed)
    shapes = hugging_face_shapes(shape, shared_weights=False)
    return {
        name: torch.randn(size, generator=generator) * (not name.endswith("layer_scalar"))
        for name, size in shapes.items()
    }


def taken(runtime, shape, settings, dtype=torch.float32):
    """Whether every weight of this rank is that of the plain twin after each step: the largest
    distance by step."""
    from dspark_megatron.mcore.optimizer import (
        build_optimizer,
        build_scheduler,
        wrap_data_parallel,
    )
    from support.tiny_draft import build_tiny_draft

    config = OptimizerConfig(**settings)
    draft = build_tiny_draft(runtime, shape, dtype)
    fill(runtime, draft, whole(shape, 0), lambda parameter: parameter)
    model = wrap_data_parallel(draft, config)
    optimizer = build_optimizer(config, model, dtype)
    scheduler = build_scheduler(config, optimizer, steps=10)
    twin, found = PlainTwin(shape, config), []
    for step in range(STEPS):
        gradients = whole(shape, step + 1)
        scheduler.step(1)
        fill(runtime, draft, gradients, lambda parameter: parameter.main_grad)
        _, norm, _ = optimizer.step()
        assert norm == pytest.approx(twin.step(gradients, optimizer.param_groups[0]["lr"]))
        found.append(distance(runtime, draft, twin.weights))
    return found


def own_parts(runtime, draft, tensors):
    """This rank's trained parameters, and what they are of an export's tensors."""
    from dspark_megatron.conversion.layouts.names import to_megatron
    from dspark_megatron.shape.layout import padded_vocab_size

    tp = runtime.tp_group.size()
    padded = padded_vocab_size(draft.shape.vocab_size, tp)
    ranks = dict(tp_rank=runtime.tp_group.rank(), tp_size=tp)
    for name, part in to_megatron(draft.shape, tensors.__getitem__, padded, **ranks):
        if (parameter := draft.get_parameter(name)).requires_grad:
            yield parameter, part


@torch.no_grad()
def fill(runtime, draft, tensors, place):
    for parameter, part in own_parts(runtime, draft, tensors):
        place(parameter).copy_(part)


def distance(runtime, draft, tensors):
    """The largest; weights are about 1, and a step of Muon changes them by 0.2 times its rate."""
    return max(
        float((parameter.detach().float() - part.detach()).abs().max())
        for parameter, part in own_parts(runtime, draft, tensors)
    )


class PlainTwin:
    """PyTorch's optimizers on the tensors of an export."""

    def __init__(self, shape, config):
        self.config = config
        self.weights = {name: x.requires_grad_() for name, x in whole(shape, 0).items()}
        apart = ("markov_w1.weight", "markov_w2.weight", "confidence_head.proj.weight")
        is_muons = {n: x.dim() == 2 and not n.endswith(apart) for n, x in self.weights.items()}
        matrices = [x for name, x in self.weights.items() if is_muons[name]]
        rest = [x for name, x in self.weights.items() if not is_muons[name]]
        decayed, others = [x for x in rest if x.dim() == 2], [x for x in rest if x.dim() < 2]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizers = [
            torch.optim.Muon(
                matrices,
                weight_decay=config.muon_weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(groups, weight_decay=config.weight_decay),
        ]

    def step(self, gradients, lr):
        for name, weight in self.weights.items():
            weight.grad = gradients[name].clone()
        bound = self.config.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), bound)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        return float(norm)


LAYOUTS = [(1, 1, True), (2, 1, True), (2, 2, False), (4, 4, True), (4, 2, True), (4, 2, False)]


@pytest.mark.parametrize("world, tp, distributed", LAYOUTS)
def test_a_step_equals_that_on_whole_matrices(pool, world, tp, distributed):
    shapes = [SHAPE, SHARED_HEADS, SHAPES["rnn"], GEMMA4]
    settings = {**SETTINGS, "use_distributed_optimizer": distributed}
    for shape in shapes:
        for distances in pool.run(taken, world=world, tp=tp, shape=shape, settings=settings):
            print(distances)
            assert max(distances) < 1e-5
