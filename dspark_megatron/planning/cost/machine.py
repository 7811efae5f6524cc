"""The GPUs that a run is planned for."""

import math
from dataclasses import dataclass, field

from dspark_megatron.config.rules import MOST
from dspark_megatron.errors import require
from dspark_megatron.planning.cost.rates import Rates

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    gpus_per_node: int
    nodes: int
    gpu_memory_gib: float
    margin: float = 0.9
    """Share of the memory that a plan may fill: what is not planned needs the rest."""
    rates: Rates = field(default_factory=Rates)

    def validate(self) -> None:
        for name in ("gpus_per_node", "nodes"):
            require(getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be >= 1")
        most = MOST["parallel.tensor_parallel"]
        require(
            self.world_size <= most,
            f"nodes ({self.nodes}) x gpus_per_node ({self.gpus_per_node}) must be at most {most:,}",
        )
        memory = self.gpu_memory_gib
        require(math.isfinite(memory) and memory > 0, f"gpu_memory_gib ({memory:g}) must be > 0")
        require(
            0 < self.margin <= 1,
            f"margin ({self.margin:g}), the share of a GPU's memory that is planned with, must be "
            "in (0, 1]",
        )
        self.rates.validate()

    @property
    def world_size(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def usable_bytes(self) -> float:
        return self.gpu_memory_gib * self.margin * GIB
