"""What pipeline ranks give each other arrives at its owner, whatever the shapes."""

import pytest
import torch
import torch.distributed as dist

COUNT = 3
"""Micro-batches of each rank."""


def own_batches(rank):
    """Of other shapes on each rank and in each turn."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [(1 + (rank + j) % 2, 3 + 2 * rank + j) for j in range(COUNT)]
    return [torch.randint(0, 99, size, generator=generator) for size in sizes]


def in_run_order(ranks):
    return [own_batches(rank)[j] for j in range(COUNT) for rank in range(ranks)]


def gathered(runtime):
    from dspark_megatron.targets.megatron.exchange import gather_batches

    return gather_batches(own_batches(runtime.rank), pp_group=dist.group.WORLD)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_knows_all_micro_batches(pool, world):
    expected = in_run_order(world)
    for found in pool.run(gathered, world=world, tp=1):
        assert len(found) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def mark(place, stage, shape, width):
    """States that say where they are from."""
    return torch.arange(shape[0] * shape[1] * width).view(*shape, width) + 1e3 * stage + 1e5 * place


def delivered(runtime, widths):
    from dspark_megatron.targets.megatron.exchange import Outbox

    shapes = [tuple(batch.t().shape) for batch in in_run_order(runtime.world_size)]
    place = (torch.float32, runtime.device)
    outbox = Outbox(shapes, widths, *place, pp_group=dist.group.WORLD)
    for number, rows in outbox.states.items():
        rows.copy_(mark(number, runtime.rank, shapes[number], widths[runtime.rank]))
    return outbox.deliver()


@pytest.mark.parametrize("widths", [[5], [2, 3], [4, 0], [0, 1, 2, 5]])
def test_states_arrive_at_their_owner(pool, widths):
    """Of stages that keep different numbers of a token, or none."""
    world = len(widths)
    shapes = [tuple(batch.t().shape) for batch in in_run_order(world)]
    for rank, found in enumerate(pool.run(delivered, world=world, tp=1, widths=widths)):
        assert len(found) == COUNT
        for j, parts in enumerate(found):
            number = j * world + rank
            for stage, part in enumerate(parts):
                expected = mark(number, stage, shapes[number], widths[stage])
                assert torch.equal(part, expected)
