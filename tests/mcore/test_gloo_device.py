"""What gloo keeps for the groups of a process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from support.tool_runs import run_python

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")


def threads_and_a_sum(runtime):
    """How many threads look for gloo's work beside the groups of Megatron-Core and three more, and
    what the last of these adds up."""
    groups = [dist.new_group() for _ in range(3)]
    number = torch.tensor(runtime.rank + 1.0)
    dist.all_reduce(number, group=groups[-1])
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop"), number.item()


def test_all_groups_of_a_process_share_one_device(pool):
    assert pool.run(threads_and_a_sum, world=2, tp=2) == [(1, 3.0), (1, 3.0)]


def test_an_unknown_interface_is_named():
    program = (
        "import torch.distributed as dist\n"
        "from dspark_megatron.mcore.prepare import prepare_megatron\n"
        "prepare_megatron()\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)"
    )
    code, text = run_python("-c", program, GLOO_SOCKET_IFNAME="lo,none0")
    assert code and "GLOO_SOCKET_IFNAME names none0, which this machine does not have" in text
