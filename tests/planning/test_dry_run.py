"""The figures of --dry-run are those of the real model."""

import re

import pytest
import torch

from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.planning.memory import rank_memory
from dspark_megatron.planning.recommend import evenly_spread_layers
from dspark_megatron.planning.target.rank_model import target_bytes
from dspark_megatron.run.check import check
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.huggingface.split import TargetSplit
from support.paths import PUBLIC_CONFIGS, ROOT
from support.target_families import make_family
from support.tiny_target import make_target, tiny_config

pytestmark = pytest.mark.slow


def test_the_text_has_layout_and_memory(tiny_run):
    text = describe_run(tiny_config(tiny_run, parallel={"tensor_parallel": 2}), world_size=4)
    assert "4 ranks = 2 tensor-parallel x 2 data-parallel" in text
    assert "block_size: 3" in text and "optimizer state" in text
    assert "\nobjective: (0.1 ce + 0.9 l1) by exp(-k/4) + 1 confidence " in text


def test_bad_layouts_are_refused_as_in_the_run(tiny_run):
    with pytest.raises(ConfigError, match="global_batch_size"):
        describe_run(tiny_config(tiny_run, train={"global_batch_size": 3}), world_size=2)


def allocated(runtime, config):
    """Bytes of this rank: target, frozen replicas, draft weights, gradient buckets, optimizer."""
    from dspark_megatron.run import states as states_source
    from dspark_megatron.training import loop
    from dspark_megatron.training.ending.stop_requests import StopRequests
    from support.target_states import elements

    kept = []
    build = loop.build_optimizer

    def keep(settings, model, dtype):
        kept.extend([model, build(settings, model, dtype)])
        return kept[1]

    loop.build_optimizer = keep
    targets, build_target = [], states_source.build_target

    def keep_target(*arguments, **options):
        targets.append(build_target(*arguments, **options))
        return targets[0]

    states_source.build_target = keep_target
    try:
        loop.train(check(config, runtime.world_size), runtime, StopRequests())
    finally:
        loop.build_optimizer, states_source.build_target = build, build_target
    model, optimizer = kept
    target = targets[0].model
    trained = [p for p in model.module.parameters() if p.requires_grad]
    frozen = [p for p in model.module.parameters() if not p.requires_grad]
    return {
        "frozen target": elements(target) * next(target.parameters()).element_size(),
        "frozen embedding and head": sum(p.nbytes for p in frozen),
        "draft weights": sum(p.nbytes for p in trained),
        "draft gradients (fp32)": sum(b.grad_data.nbytes for b in model.buffers),
        "optimizer state (fp32)": optimizer_bytes(optimizer),
    }


def optimizer_bytes(optimizer):
    """Moments, and main weights where they are not the model's own."""
    if hasattr(optimizer, "chained_optimizers"):
        return sum(map(optimizer_bytes, optimizer.chained_optimizers))
    states = optimizer.optimizer.state
    moments = sum(
        x.nbytes for state in states.values() for x in state.values() if x.dim() and x.numel() > 1
    )
    return moments + sum(p.nbytes for p in states if optimizer.config.bf16)


def config_of(tiny_run, tmp_path, target, tp, shard, dtype, **parallel):
    return tiny_config(
        tiny_run,
        target={"path": str(target), "shard_across_data_parallel": shard},
        model={"ffn_hidden_size": 256, "markov_rank": 32},
        train={"output_dir": str(tmp_path / "run"), "iterations": 1, "dtype": dtype},
        parallel={"tensor_parallel": tp, **parallel},
    )


def assert_planned(pool, config, world, tp):
    """Within 2%: buckets are padded, and shards of odd sizes."""
    planned = rank_memory(check(config, world)).held
    for rank in pool.run(allocated, world=world, tp=tp, config=config):
        for part, size in rank.items():
            assert size == pytest.approx(planned[part], rel=0.02), part


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "world, tp, shard",
    [(1, 1, 1), (2, 2, 1), (4, 2, 0), (4, 2, 1), (2, 1, 1), (2, 1, 2), (4, 4, 1)],
)
def test_the_memory_is_what_is_allocated(pool, tiny_run, tmp_path, world, tp, shard, dtype):
    target = make_target(tmp_path / "target", hidden_size=128)
    config = config_of(tiny_run, tmp_path, target, tp, shard, dtype)
    assert_planned(pool, config, world, tp)


@pytest.mark.parametrize("world, tp, shard, ep", [(2, 2, 1, 2), (4, 2, 2, 2), (4, 2, 2, 4)])
def test_the_memory_with_spread_experts(pool, tiny_run, tmp_path, world, tp, shard, ep):
    target = make_family(tmp_path / "target", "qwen3_moe", hidden_size=128)
    config = config_of(tiny_run, tmp_path, target, tp, shard, "bfloat16", expert_parallel=ep)
    assert_planned(pool, config, world, tp)


RECIPES = {
    "qwen3-4b": 8,
    "qwen3-8b": 8,
    "qwen3-32b": 8,
    "llama-3.1-70b": 8,
    "qwen2.5-72b": 8,
    "llama-3.1-405b": 32,
    "qwen3-235b-a22b": 8,
    "deepseek-v3": 32,
}
"""Ranks by recipe."""
OF_QWEN3_8B = ("recipes/backbone", "recipes/dpace", "recipes/fine_tune")
"""On 8 ranks."""
EXAMPLES = ROOT / "examples"


def test_every_recipe_has_a_public_config():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(RECIPES)
    assert {f"recipes/{path.stem}" for path in EXAMPLES.glob("recipes/*")} == set(OF_QWEN3_8B)


@pytest.mark.parametrize("name", [*RECIPES, *OF_QWEN3_8B])
def test_a_recipe_fits_as_it_says(name):
    """Its comment has the plan's figures, and leaves room for what is not planned."""
    recipe, ranks = EXAMPLES / f"{name}.yaml", RECIPES.get(name, 8)
    target = PUBLIC_CONFIGS / ("qwen3-8b" if name in OF_QWEN3_8B else name)
    config = load_config(recipe, [f"target.path={target}", 'train.initial_checkpoint=""'])
    text = describe_run(config, ranks)
    assert f"not checked: the tokenizer, since {target} has none" in text
    memory = rank_memory(check(config, ranks, use="plan"))
    sizes = [*memory.held.values(), sum(memory.moments[memory.highest].values()), memory.total]
    comment = re.search(r"# Memory of a GPU, GiB:.*?moment", recipe.read_text(), re.DOTALL)
    assert re.findall(r"\d+\.\d", comment[0]) == [f"{size / 2**30:.1f}" for size in sizes]
    assert memory.total < 0.9 * 80e9


def test_the_backbone_has_the_shape_that_its_comments_speak_of():
    model = load_config(EXAMPLES / "recipes/backbone.yaml").model
    text = load_target_config(PUBLIC_CONFIGS / "qwen3-8b").get_text_config()
    assert model.target_layer_ids == evenly_spread_layers(text.num_hidden_layers, taps=8)
    assert (model.num_layers, model.ffn_hidden_size) == (6, 3 * text.hidden_size)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_splits_rows_and_overlaps_where_that_helps(name):
    config = load_config(EXAMPLES / f"{name}.yaml")
    assert config.parallel.sequence_parallel == (config.parallel.tensor_parallel > 1)
    assert config.optimizer.overlap_grad_reduce == (RECIPES[name] > 8)


PARAMETERS = {
    "qwen3-4b": 4.02e9,
    "qwen3-8b": 7.57e9,
    "llama-3.1-70b": 69.5e9,
    "qwen2.5-72b": 71.5e9,
    "llama-3.1-405b": 403.8e9,
    "qwen3-235b-a22b": 234.5e9,
    "deepseek-v3": 670.1e9,
}
"""Of the base models: published counts (4.02, 8.19, 70.6, 72.7, 405.9, 235.1 and 671.0 billion)
less their LM heads, which Qwen3-4B has not."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_bytes_of_public_targets(name):
    config = load_target_config(PUBLIC_CONFIGS / name)
    whole = target_bytes(config, torch.bfloat16, TargetSplit())
    assert whole / 2 == pytest.approx(PARAMETERS[name], rel=0.005)
    if name not in ("qwen3-235b-a22b", "deepseek-v3"):  # whole on each rank: routers, attention
        part = target_bytes(config, torch.bfloat16, TargetSplit(8, 4, 4))
        assert part == pytest.approx(whole / 32, rel=0.001)
    below = target_bytes(config, torch.bfloat16, TargetSplit(), last_layer=0)
    assert below < whole / 8
