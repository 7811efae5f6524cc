"""Muon of a split draft is PyTorch's on whole matrices, and does not depend on the layout."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from dspark_megatron.config import OptimizerConfig
from support.shapes import GEMMA4, SHAPE, SHAPES
from support.tiny_target import tiny_config
from support.training_runs import (
    assert_same_curve,
    curve,
    latest,
    run_training,
    run_until_stopped,
)

SETTINGS = dict(name="muon", lr=0.02, weight_decay=0.1, muon_weight_decay=0.3)
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
    """Without clipping: the norm is a sum whose order depends on the layout."""
    settings = {**SETTINGS, "use_distributed_optimizer": distributed, "clip_grad": 0.0}
    for shape in (SHAPE, SHARED_HEADS, SHAPES["rnn"], GEMMA4):
        for distances in pool.run(taken, world=world, tp=tp, shape=shape, settings=settings):
            assert max(distances) < 1e-6


def test_gradients_are_clipped_by_the_norm_of_all(pool):
    """Newton-Schulz iterations are in bf16: a gradient that is off in its last bit may move an
    update, of about 0.2 times the rate, by one of 2^8."""
    settings = {**SETTINGS, "clip_grad": 0.5}
    for distances in pool.run(taken, world=4, tp=2, shape=SHAPES["rnn"], settings=settings):
        assert max(distances) < 5 * 0.2 * 0.02 / 2**8


def test_every_matrix_of_an_export_is_muons_but_those_of_the_vocabulary(pool):
    from dspark_megatron.conversion.layouts.names import Rule, name_table

    for shape in (*SHAPES.values(), GEMMA4):
        (found,) = pool.run(names_and_matrices, world=1, tp=1, shape=shape)
        wide = {n.megatron: len(n.hugging_face) for n in name_table(shape) if n.rule != Rule.VOCAB}
        assert found == {
            name: count
            for name, count in wide.items()
            if name.endswith("weight") and "norm" not in name and "confidence" not in name
        }


def names_and_matrices(runtime, shape):
    from support.tiny_draft import build_tiny_draft

    splits = build_tiny_draft(runtime, shape).split_matrices()
    return {name: split.matrices for name, split in splits.items()}


def muon_config(tiny_run, output, *, tp=1, sequence_parallel=False, distributed=True, **train):
    train = {"output_dir": str(output), "iterations": 12, "save_every": 4, **train}
    parallel = {"tensor_parallel": tp, "sequence_parallel": sequence_parallel}
    optimizer = {"name": "muon", "use_distributed_optimizer": distributed}
    return tiny_config(tiny_run, train=train, parallel=parallel, optimizer=optimizer)


@pytest.fixture(scope="module")
def muon_run(pool, tiny_run, tmp_path_factory):
    """The output of twelve steps on two data-parallel ranks that each take all of them."""
    output = tmp_path_factory.mktemp("muon")
    config = muon_config(tiny_run, output, distributed=False)
    pool.run(run_training, world=2, tp=1, config=config)
    return output


def train_with_one_owner(runtime, config):
    """All but one rank own nothing, as where there are more ranks than weights."""
    from dspark_megatron.mcore import owned_weights

    def one_by_one(weights, tp_size, dp_size):
        return [[[weight], *[[] for _ in range(dp_size - 1)]] for weight in weights]

    with mock.patch.object(owned_weights, "_rounds", one_by_one):
        run_training(runtime, config)


def test_a_run_goes_on_at_any_layout(pool, tiny_run, muon_run, tmp_path):
    """Rounding to bf16 in Newton-Schulz iterations lets curves part by 1e-4 in 20 steps."""
    run = tmp_path / "run"
    shutil.copytree(muon_run, run)
    split = dict(tp=2, sequence_parallel=True, async_save=True)
    config = muon_config(tiny_run, run, resume_from=4, **split)
    pool.run(run_until_stopped, world=4, tp=2, config=config, steps=4)
    assert latest(run) == 8
    pool.run(train_with_one_owner, world=2, tp=1, config=muon_config(tiny_run, run))
    assert_same_curve(curve(run), curve(muon_run), rel=1e-3)
    assert curve(run)[-1]["loss"] < 0.95 * curve(run)[0]["loss"]


def stored_tensors(run, iteration):
    """All of a checkpoint: weights, momentum, and AdamW's moments of the rest."""
    from dspark_megatron.storage.torch_dist_folder import TorchDistFolder

    folder = TorchDistFolder(run / "checkpoints" / f"iter_{iteration:07d}")
    return {name: folder.tensor(name) for name in folder.shapes}


def test_skipped_steps_leave_weights_and_momentum_alone(pool, tiny_run, muon_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(muon_run, run)
    bad = dict(skip_gradient_norm_above=1e-6, max_skipped_steps=8)
    config = muon_config(tiny_run, run, distributed=False, resume_from=4, **bad)
    pool.run(run_training, world=2, tp=1, config=config)
    assert curve(run)[-1]["skipped_steps"] == 8 and latest(run) == 12
    before, after = stored_tensors(muon_run, 4), stored_tensors(run, 12)
    momentum = [tensor for name, tensor in before.items() if "momentum_buffer" in name]
    assert momentum and all(tensor.any() for tensor in momentum)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_bfloat16_with_fp32_main_weights_follows_float32(pool, tiny_run, muon_run, tmp_path):
    config = muon_config(tiny_run, tmp_path, dtype="bfloat16", tp=2)
    pool.run(run_training, world=2, tp=2, config=config)
    for mine, theirs in zip(curve(tmp_path), curve(muon_run), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.01)


def restored(runtime, config):
    """Fill main weights and momentum, save, load into another optimizer: whether they are there."""
    from dspark_megatron.mcore.optimizer import build_optimizer, make_state, wrap_data_parallel
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from dspark_megatron.run.checkpoints.saving import save_checkpoint
    from dspark_megatron.run.checkpoints.state import RunState
    from dspark_megatron.run.identity import export_settings, run_identity

    plan = check(config, runtime.world_size)
    drafts = [build_draft(plan, runtime) for _ in range(2)]
    saved, loaded = (
        build_optimizer(config.optimizer, wrap_data_parallel(draft, config.optimizer), plan.dtype)
        for draft in drafts
    )
    make_state(saved)
    generator = torch.Generator().manual_seed(runtime.rank)
    for tensor in saved.chained_optimizers[-1]._tensors().values():
        tensor.detach().normal_(generator=generator)
    meta = {"format": 1, **run_identity(plan), **export_settings(plan)}
    checkpoints = Path(config.train.output_dir, "checkpoints")
    folder = save_checkpoint(checkpoints, RunState(1, 4), meta, drafts[0], saved, keep_last=1)
    load_checkpoint(folder, drafts[1], loaded)
    found = [one.chained_optimizers[-1]._tensors() for one in (saved, loaded)]
    return len(found[0]), all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_checkpoint_keeps_main_weights_and_momentum(pool, tiny_run, tmp_path):
    config = muon_config(tiny_run, tmp_path, dtype="bfloat16", tp=2)
    tensors = [count for count, same in pool.run(restored, world=2, tp=2, config=config) if same]
    matrices = 1 + 2 * 7  # of the context, and of each layer
    assert len(tensors) == 2 and sum(tensors) == 2 * matrices


def test_a_run_keeps_its_optimizer(pool, tiny_run, muon_run):
    config = muon_config(tiny_run, muon_run)
    config.optimizer.name = "adamw"
    with pytest.raises(AssertionError, match="optimizer.name: 'muon' there, 'adamw' here"):
        pool.run(run_training, world=1, tp=1, config=config)


def test_a_checkpoint_is_whole_exports_and_is_a_start_for_adamw(pool, tiny_run, muon_run, tmp_path):
    from safetensors import safe_open

    from dspark_megatron.conversion.export import export_checkpoint
    from dspark_megatron.storage.checkpoints.whole import check_whole

    check_whole(muon_run / "checkpoints" / "iter_0000012", "full")
    export = export_checkpoint(muon_run, tiny_run["target"]["path"], tmp_path / "export")
    with safe_open(export / "model.safetensors", "pt") as file:
        assert "layers.0.self_attn.k_proj.weight" in file.keys()
    train = {"output_dir": str(tmp_path / "next"), "iterations": 1}
    config = tiny_config(tiny_run, train={**train, "initial_checkpoint": str(muon_run)})
    pool.run(run_training, world=1, tp=1, config=config)
    (first,) = curve(tmp_path / "next")
    assert first["loss"] < 0.95 * curve(muon_run)[0]["loss"]


@pytest.mark.parametrize(
    "wrong", [{"muon_momentum": 1.0}, {"muon_weight_decay": -0.1}, {"muon_steps": 0}]
)
def test_settings_of_muon_are_checked(wrong):
    from dspark_megatron.errors import ConfigError

    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"optimizer.{name}.*{value}"):
        OptimizerConfig(**wrong).validate()
