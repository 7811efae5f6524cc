"""The figures of --dry-run are those of the real model."""

import pytest
from tiny_draft import SHAPES, build_tiny_draft
from tiny_target import tiny_config

from dspark_megatron.config import ConfigError
from dspark_megatron.training.dry_run import _local_parameters, describe_run


def trained_elements(runtime, shape):
    model = build_tiny_draft(runtime, shape)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", SHAPES)
def test_parameters_of_a_rank(pool, kind, tp):
    counted = pool.run(trained_elements, world=tp, tp=tp, shape=SHAPES[kind])
    assert set(counted) == {_local_parameters(SHAPES[kind], tp)}


def test_the_text_has_layout_and_memory(tiny_run):
    text = describe_run(tiny_config(tiny_run, parallel={"tensor_parallel": 2}), world_size=4)
    assert "4 ranks = 2 tensor-parallel x 2 data-parallel" in text
    assert "block_size: 3" in text and "optimizer state" in text


def test_bad_layouts_are_refused_as_in_the_run(tiny_run):
    with pytest.raises(ConfigError, match="global_batch_size"):
        describe_run(tiny_config(tiny_run, train={"global_batch_size": 3}), world_size=2)
