"""A target in pipeline stages gives every rank the states that the whole target gives it."""

import zlib

import pytest
import torch

from dspark_megatron.data.batch import Batch
from dspark_megatron.planning.memory import rank_memory
from dspark_megatron.run.check import check
from support.megatron_targets import config_of, whole
from support.target_states import IDS as TOKENS

IDS = (0, 2, 5)
SHAPE = dict(
    num_layers=7,  # no multiple of the stages
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=61,
    qk_layernorm=True,
    add_qkv_bias=False,
    share_embeddings_and_output_weights=False,
    layernorm_epsilon=1e-6,
    rotary_base=10000.0,
    rope_scaling_factor=None,
)
EXPERTS = dict(num_experts=4, moe_ffn_hidden_size=16, moe_router_topk=2)
LENGTHS = (9, 7, 12, 5, 8, 8, 3, 10)
"""Of micro-batches in the order of the run; those of two ranks and of four."""


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 61, (1 + place % 2, length), generator=generator)
        for place, length in enumerate(LENGTHS)
    ]


def build_stage(runtime, shape, pp_size, ep_size=1, sequence_parallel=False):
    """This rank's part of a model whose weights depend on their names and shards alone."""
    from megatron.core.utils import get_pg_rank

    from dspark_megatron.targets.megatron.gpt_model import build_gpt_model
    from dspark_megatron.targets.megatron.gpt_shape import GPTShape
    from dspark_megatron.targets.megatron.groups import target_groups

    groups = target_groups(tp_group=runtime.tp_group, pp_size=pp_size, ep_size=ep_size)
    stage = get_pg_rank(groups.pp)
    model = build_gpt_model(
        GPTShape(**shape),
        groups,
        params_dtype=torch.float32,
        device=runtime.device,
        sequence_parallel=sequence_parallel,
        pre_process=stage == 0,
        post_process=stage == pp_size - 1,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before, layers, after = name.partition("decoder.layers.")
            if layers:
                local, _, rest = after.partition(".")
                after = f"{model.decoder.layers[int(local)].layer_number}.{rest}"
            shard = 0 if "norm" in name or "router" in name else 1 + runtime.tp_group.rank()
            shard += groups.ep.rank() if "experts" in name else 0
            noise = torch.Generator().manual_seed(zlib.crc32(f"{shard} {before}{after}".encode()))
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=noise))
            if parameter.dim() == 1:
                parameter += 1
    return model


def whole_states(runtime, shape, ids=IDS, with_last_hidden=True, **options):
    from dspark_megatron.targets.megatron.target import MegatronTarget

    model = build_stage(runtime, shape, 1, **options)
    target = MegatronTarget(model, ids, with_last_hidden=with_last_hidden)
    states = [target.states(Batch(ids)) for ids in batches()]
    return [(one.taps, one.last_hidden) for one in states]


def stage_states(runtime, shape, pp_size, per_run=None, ids=IDS, with_last_hidden=True, **options):
    """Which micro-batches this rank has, and their states, announced, and of the first once more;
    elements of this stage."""
    from dspark_megatron.targets.megatron.pipeline import PipelineTarget

    model = build_stage(runtime, shape, pp_size, **options)
    target = PipelineTarget(
        model, ids, micro_batches_per_run=per_run, with_last_hidden=with_last_hidden
    )
    shift = 3 * model.pg_collection.dp.rank()  # pipelines beside each other run other ones
    numbers = range(shift + target.pp_group.rank(), shift + len(LENGTHS), pp_size)
    numbers = [number % len(LENGTHS) for number in numbers]
    own = [Batch(batches()[number]) for number in numbers]
    target.expect(own)
    states = [target.states(batch) for batch in [*own, own[0]]]
    pairs = [(one.taps, one.last_hidden) for one in states]
    assert not any(tensor.requires_grad for pair in pairs for tensor in pair if tensor is not None)
    size = sum(parameter.numel() for parameter in target.model.parameters())
    return [*numbers, numbers[0]], pairs, size


LAYOUTS = [(2, 1, 2, None), (2, 1, 2, 1), (4, 2, 2, 3), (4, 1, 4, None), (4, 1, 2, 3)]
"""World size, tensor-parallel size, pipeline stages, micro-batches of a rank in one run."""


def assert_states(found, expected):
    for numbers, states, _ in found:
        for number, mine in zip(numbers, states, strict=True):
            for got, wanted in zip(mine, expected[number], strict=True):
                assert (got is None) == (wanted is None)
                if got is not None:
                    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world, tp, pp, per_run", LAYOUTS)
def test_states_are_those_of_the_whole_target(pool, world, tp, pp, per_run):
    """Of samples of any length, however many of them go through together."""
    expected = pool.run(whole_states, world=tp, tp=tp, shape=SHAPE)[0]
    found = pool.run(stage_states, world=world, tp=tp, shape=SHAPE, pp_size=pp, per_run=per_run)
    assert_states(found, expected)


@pytest.mark.parametrize("ids, with_last_hidden", [(IDS, False), ((1, 2), False), ((0,), True)])
def test_states_of_fewer_layers(pool, ids, with_last_hidden):
    """Stages without a tap, and a target whose upper layers nobody needs."""
    options = dict(shape=SHAPE, ids=ids, with_last_hidden=with_last_hidden)
    expected = pool.run(whole_states, world=1, tp=1, **options)[0]
    found = pool.run(stage_states, world=2, tp=1, pp_size=2, **options)
    assert_states(found, expected)
    if not with_last_hidden:
        whole = pool.run(stage_states, world=2, tp=1, pp_size=2, shape=SHAPE)
        assert sum(size for *_, size in found) < sum(size for *_, size in whole)


@pytest.mark.parametrize("shape", [SHAPE, {**SHAPE, **EXPERTS}])
def test_states_with_sequence_parallelism(pool, shape):
    options = dict(shape=shape, sequence_parallel=True)
    expected = pool.run(whole_states, world=2, tp=2, **options)[0]
    assert_states(pool.run(stage_states, world=4, tp=2, pp_size=2, **options), expected)


def test_states_of_experts_spread_over_a_stage(pool):
    """Whole experts on data-parallel neighbours, whose tokens meet there."""
    shape = {**SHAPE, **EXPERTS}
    expected = pool.run(whole_states, world=2, tp=1, shape=shape, ep_size=2)[0]
    found = pool.run(stage_states, world=4, tp=1, pp_size=2, shape=shape, ep_size=2)
    assert_states(found, expected)


def checked_states(runtime, config):
    """After the check of the logits; and the bytes of this stage."""
    from dspark_megatron.run.build import build_draft, build_target, load_target_head
    from dspark_megatron.targets.start_checks import check_target_logits

    plan = check(config, runtime.world_size)
    target, draft = build_target(plan, runtime), build_draft(plan, runtime)
    head = load_target_head(plan, draft, target)
    check_target_logits(target, config.target.path, head, draft.vocab_shard, TOKENS)
    states = target.states(Batch(TOKENS))
    held = sum(parameter.nbytes for parameter in target.model.parameters())
    return states.taps, states.last_hidden, held


FOLDERS = [("qwen3", 2, 1, 1), ("llama", 4, 2, 1), ("experts", 4, 1, 2), ("mixed", 4, 2, 2)]
"""Name of the target, world size, tensor- and expert-parallel size."""


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("name, world, tp, ep", FOLDERS)
def test_stages_of_a_folder_and_of_a_checkpoint(
    pool,
    tiny_run,
    target,
    checkpoint,
    name,
    world,
    tp,
    ep,
    is_saved,
):
    """Whatever layout wrote it, with tied and with other heads."""
    path, settings = target(name), {}
    if is_saved:
        run, path = checkpoint(name)
        settings = {"target": {"checkpoint": str(run)}}
    parallel = {"pipeline_parallel": 2}
    config = config_of(tiny_run, path, tp, ep, parallel=parallel, **settings)
    ranks, expected = (
        pool.run(checked_states, world=world, tp=tp, config=config),
        whole(target(name)),
    )
    for taps, last_hidden, _ in ranks:
        torch.testing.assert_close(taps, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last_hidden, expected[1], rtol=1e-4, atol=1e-5)
    planned = rank_memory(check(config, world)).held["frozen target"]
    assert max(held for *_, held in ranks) == planned
