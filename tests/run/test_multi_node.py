"""Two nodes of two ranks, each in a network namespace of its own, started by the launch script."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from support.paths import ROOT
from support.tiny_target import tiny_config
from support.training_runs import (
    assert_same_curve,
    curve,
    curve_lines,
    kill_tree,
    latest,
    run_training,
    status,
    write_config,
)

SECONDS = 900
"""For a start, or for an end: a hang is a failure (torchrun alone would wait 300)."""


@dataclass(frozen=True)
class Node:
    rank: int
    namespace: str
    interface: str
    address: str


@pytest.fixture
def nodes():
    """Two hosts on one cable; they share the file system and nothing of the network."""
    tag = f"{os.getpid() % 100000}"
    made = [Node(i, f"dspark{tag}n{i}", f"ds{tag}v{i}", f"10.213.77.{i + 1}") for i in (0, 1)]
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (iproute2) to make network namespaces")
    try:
        for node in made:
            ip("netns", "add", node.namespace)
        first, second = made
        cable = ["link", "add", first.interface, "netns", first.namespace, "type", "veth", "peer"]
        ip(*cable, "name", second.interface, "netns", second.namespace)
        for node in made:
            inside = ["-n", node.namespace]
            ip(*inside, "address", "add", f"{node.address}/24", "dev", node.interface)
            for link in ("lo", node.interface):
                ip(*inside, "link", "set", link, "up")
        yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    finally:
        for node in made:
            for pid in ip("netns", "pids", node.namespace, check=False).split():
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(int(pid)).kill()
            ip("netns", "delete", node.namespace, check=False)


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True).stdout


class Job:
    """Both nodes' launch scripts, their output in files."""

    def __init__(self, nodes, folder, config_file):
        self.logs = [folder / f"node{node.rank}.log" for node in nodes]
        self.processes = [
            start(node, nodes[0].address, config_file, log)
            for node, log in zip(nodes, self.logs, strict=True)
        ]

    def wait_for(self, condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.002)

    def codes(self):
        """Exit codes of both nodes."""
        try:
            return [process.wait(SECONDS) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"a node did not end in {SECONDS} seconds:\n{self.text()}")

    def text(self):
        return "\n".join(log.read_text() for log in self.logs)


def start(node, rendezvous_host, config_file, log):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NODES": "2",
        "NODE_RANK": str(node.rank),
        "NODE_ADDRESS": node.address,  # both have the same host name
        "RENDEZVOUS": f"{rendezvous_host}:29400",
        "RANKS_PER_NODE": "2",
        "GLOO_SOCKET_IFNAME": node.interface,
        "OMP_NUM_THREADS": "1",
    }
    script = ROOT / "examples" / "multi_node" / "launch_node.sh"
    with log.open("w") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", node.namespace, str(script), "--config", str(config_file)],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def test_stopped_on_one_node_killed_on_the_other_and_continued(pool, tiny_run, tmp_path, nodes):
    """Tensor parallelism within a node, data parallelism between them."""
    layout = {"tensor_parallel": 2}
    train = {"iterations": 40, "micro_batch_size": 2}
    whole = {**train, "output_dir": str(tmp_path / "whole")}
    config = tiny_config(tiny_run, train=whole, parallel=layout)
    pool.run(run_training, world=4, tp=2, config=config)

    output = tmp_path / "run"
    broken = {**train, "output_dir": str(output)}
    config_file = write_config(tmp_path, tiny_run, train=broken, parallel=layout)

    job = Job(nodes, tmp_path, config_file)
    job.wait_for(lambda: (output / "metrics.jsonl").exists() and len(curve_lines(output)) >= 3)
    assert status(output) == "running\n"
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.codes() == [0, 0], job.text()
    assert "stopped by a signal" in job.text()
    stopped_at = latest(output)
    assert 3 <= stopped_at < 40 and status(output) == "stopped\n"

    job = Job(nodes, tmp_path, config_file)
    job.wait_for(lambda: latest(output) > stopped_at)
    kill_tree(job.processes[0])  # the node that serves the rendezvous
    assert job.codes()[1] not in (0, -signal.SIGKILL), job.text()
    assert latest(output) < 40 and status(output) == "running\n"

    job = Job(nodes, tmp_path, config_file)
    assert job.codes() == [0, 0], job.text()
    assert status(output) == "completed\n"
    assert_same_curve(curve(output), curve(tmp_path / "whole"))
