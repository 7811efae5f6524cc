"""The Transformer Engine layer spec, on a stand-in for its classes: the parameters, checkpoints and
gradients of the local backend. Transformer Engine itself needs a GPU."""

import ast
import inspect
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.shape.attention import DraftAttention
from support import transformer_engine_stand_in as stand_in
from support.draft_steps import assert_plain_step, step_gradients
from support.shapes import SHAPE, SHAPES, meta_of
from support.tiny_draft import build_tiny_draft, layout_of, make_samples, sample_logits
from support.tiny_target import tiny_config

WRAPPERS = "megatron.core.extensions.transformer_engine"
SPEC = "dspark_megatron.model.layers.transformer_engine"
BIASED = replace(SHAPE, attention=DraftAttention(sink=True, biases=True))
NAMES = ("TENorm", "TELinear", "TERowParallelLinear", "TELayerNormColumnParallelLinear")


def spec_on_stand_in():
    """The real layer spec, built from the stand-in's classes."""
    with mock.patch.dict(sys.modules, {WRAPPERS: stand_in}):
        sys.modules.pop(SPEC, None)
        from dspark_megatron.model.layers.transformer_engine import transformer_engine_layer_spec

        return transformer_engine_layer_spec()


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_takes_what_the_installed_wrapper_takes(name):
    """Read from Megatron-Core's source, since importing it needs Transformer Engine."""
    source = Path(find_spec("megatron.core").submodule_search_locations[0])
    tree = ast.parse((source / "extensions/transformer_engine.py").read_text())
    (wrapper,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)
    (init,) = (
        n
        for n in wrapper.body
        if isinstance(n, ast.FunctionDef) and n.name in ("__init__", "__new__")
    )
    spec = init.args
    defaults = len(spec.defaults)
    theirs = {arg.arg for arg in [*spec.args, *spec.kwonlyargs]}
    needed = {arg.arg for arg in spec.args[: len(spec.args) - defaults]}
    needed |= {a.arg for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is None}
    ours = getattr(stand_in, name)
    made_by = ours.__new__ if name == "TENorm" else ours.__init__
    parameters = inspect.signature(made_by).parameters
    assert needed <= set(parameters) <= {*theirs, "name"}


def engine_step(runtime, **arguments):
    return step_gradients(runtime, spec=spec_on_stand_in(), **arguments)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("world, tp, split", [(1, 1, False), (2, 2, False), (2, 2, True)])
def test_step_equals_the_plain_twin(pool, world, tp, split, recompute):
    options = dict(sequence_parallel=split, recompute_activations=recompute)
    arguments = dict(shape=SHAPE, micro_batch_size=1, **options)
    assert_plain_step(pool.run(engine_step, world=world, tp=tp, **arguments), SHAPE)


def test_step_at_tp_4(pool):
    shape = SHAPES["gated"]
    arguments = dict(shape=shape, micro_batch_size=2, sequence_parallel=True)
    assert_plain_step(pool.run(engine_step, world=4, tp=4, **arguments), shape)


def test_step_with_sinks_and_biases(pool):
    arguments = dict(shape=BIASED, micro_batch_size=1, sequence_parallel=True)
    assert_plain_step(pool.run(engine_step, world=2, tp=2, **arguments), BIASED)


def what_a_checkpoint_holds(runtime, shape):
    """Parameters and sharded tensors of both backends."""
    found = []
    for spec in (None, spec_on_stand_in()):
        draft = build_tiny_draft(runtime, shape, spec=spec)
        groups = {"dp_cp_group": runtime.dp_group}
        sharded = draft.sharded_state_dict(metadata=groups)
        parts = {
            part.key: (part.global_shape, part.global_offset, part.local_shape)
            for value in sharded.values()
            for part in _parts(value)
        }
        names = {n: tuple(p.shape) for n, p in draft.named_parameters()}
        found.append((names, layout_of(draft), parts))
    return found


def _parts(value):
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if isinstance(value, ShardedTensorFactory):
        value = value.build()
        return list(value) if isinstance(value, list) else [value]
    return [value]


@pytest.mark.parametrize("tp, shape", [(1, SHAPE), (2, SHAPE), (2, BIASED)])
def test_names_and_sharded_tensors_are_the_local_ones(pool, tp, shape):
    for local, engine in pool.run(what_a_checkpoint_holds, world=tp, tp=tp, shape=shape):
        assert engine == local
        names, _, parts = engine
        assert "layers.1.pre_mlp_layernorm.weight" in names and len(parts) > len(names) - 4
        assert not any(
            "layer_norm_weight" in name or "extra" in name for name in {**names, **parts}
        )


def save_draft(runtime, folder, engine):
    from dspark_megatron.run.checkpoints.saving import save_checkpoint
    from dspark_megatron.run.checkpoints.state import RunState

    draft = build_tiny_draft(runtime, SHAPE, spec=spec_on_stand_in() if engine else None)
    return save_checkpoint(folder, RunState(1, 8), meta_of(SHAPE), draft, None, keep_last=1)


def load_draft(runtime, folder, engine):
    """Hidden states of a draft whose weights come from the checkpoint alone."""
    from dspark_megatron.run.checkpoints.loading import load_checkpoint

    draft = build_tiny_draft(runtime, SHAPE, spec=spec_on_stand_in() if engine else None)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    load_checkpoint(folder, draft, optimizer=None)
    samples = make_samples(SHAPE, lengths=(20,))
    taps, ids = samples.taps[0], samples.input_ids[0]
    return sample_logits(draft, taps, ids, torch.tensor([4, 9, 15]))[0]


@pytest.mark.parametrize("saved, loaded", [(False, True), (True, False)])
def test_a_checkpoint_moves_between_backends(pool, tmp_path, saved, loaded):
    """At another tensor-parallel size, too."""
    first, *_ = pool.run(save_draft, world=2, tp=2, folder=tmp_path, engine=saved)
    (expected,) = pool.run(load_draft, world=1, tp=1, folder=first, engine=saved)
    (got,) = pool.run(load_draft, world=1, tp=1, folder=first, engine=loaded)
    assert not got.isnan().any()
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Transformer Engine may be there")
def test_the_backend_must_be_able_to_run(tiny_run):
    from dspark_megatron.run.check import check

    with pytest.raises(ConfigError, match="needs a GPU.*model.backend=local"):
        check(tiny_config(tiny_run, model={"backend": "transformer_engine"}), 1, use="train")
    check(tiny_config(tiny_run, model={"backend": "auto"}), 1, use="train")
