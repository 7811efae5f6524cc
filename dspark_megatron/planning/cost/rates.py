"""What a GPU and its links do in a second: the figures that times are worked out with."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from dspark_megatron.errors import require

LEAST, MOST = 1e-6, 1e9
"""Bounds of a rate: far beyond any machine, and of a size that arithmetic stands."""


@dataclass(frozen=True)
class Rates:
    """Of one GPU, by the data sheet, and the share of it that is counted on. The defaults are an
    H100 SXM's."""

    tflops: float = 989.0
    """Dense bf16 matrix products, 10^12 FLOPs a second."""
    mfu: float = 0.4
    """Share of `tflops` that the step's arithmetic reaches while it computes."""
    hbm: float = 3.35
    """Memory, 10^12 bytes a second."""
    nvlink: float = 450.0
    """Sent within a node in one direction, 10^9 bytes a second."""
    network: float = 50.0
    """Sent to other nodes in one direction, 10^9 bytes a second."""
    transfer_share: float = 0.8
    """Share of `hbm`, `nvlink` and `network` that transfers reach."""
    latency_us: float = 20.0
    """Microseconds that a collective takes however little it sends."""
    disk: float = 10.0
    """Stored states, read or written by all ranks together, 10^9 bytes a second."""
    overlap: bool = True
    """Whether the weights of a sharded target arrive while its layers compute; all other
    collectives are waited for."""

    def validate(self) -> None:
        for name in ("tflops", "hbm", "nvlink", "network", "disk"):
            check_rate(name, getattr(self, name))
        for name in ("mfu", "transfer_share"):
            share = getattr(self, name)
            require(
                LEAST <= share <= 1,
                f"{name} ({share:g}), the share of a rate that is reached, must be > 0 and <= 1",
            )
        require(
            0 <= self.latency_us <= MOST,
            f"latency_us ({self.latency_us:g}), microseconds of a collective, must be >= 0 and "
            f"<= {MOST:g}",
        )

    @property
    def flops(self) -> float:
        """A second."""
        return 1e12 * self.tflops * self.mfu

    @property
    def moved(self) -> float:
        """Bytes of the GPU's memory a second."""
        return 1e12 * self.hbm * self.transfer_share

    def sent(self, *, in_node: bool) -> float:
        """Bytes a second that a rank sends."""
        return 1e9 * (self.nvlink if in_node else self.network) * self.transfer_share

    def words(self) -> str:
        beside = ", sharded weights beside computation" if self.overlap else ", nothing overlaps"
        return (
            f"{self.tflops:g} TFLOPS x {self.mfu:g}; memory {self.hbm:g} TB/s, NVLink "
            f"{self.nvlink:g} GB/s and network {self.network:g} GB/s x {self.transfer_share:g}; "
            f"{self.latency_us:g} us a collective{beside}"
        )


def check_rate(name: str, value: float) -> None:
    require(
        math.isfinite(value) and LEAST <= value <= MOST,
        f"{name} ({value:g}) must be > 0, and a number from {LEAST:g} to {MOST:g}",
    )


@dataclass(frozen=True)
class GPU:
    """A model by its maker's data sheet."""

    memory_gb: float
    """10^9 bytes."""
    rates: Rates

    @property
    def memory_gib(self) -> float:
        return round(self.memory_gb * 1e9 / 2**30, 1)


GPUS = {
    "a100": GPU(80, Rates(tflops=312, hbm=2.039, nvlink=300, network=25)),
    "h100": GPU(80, Rates()),
    "h200": GPU(141, Rates(hbm=4.8)),
    "b200": GPU(180, Rates(tflops=2250, hbm=8.0, nvlink=900)),
}
"""SXM modules of 8 in a node. The network is one port for each GPU, as in the maker's own nodes:
200 Gb/s for an A100, 400 Gb/s for the others."""


def rates_of(gpu: str, given: dict[str, Any]) -> Rates:
    """Those of the GPU, but for the ones that are given and not None. ConfigError where a rate
    cannot be."""
    require(
        gpu in GPUS, f"the GPU ({gpu}) must be one of {', '.join(GPUS)}; give its rates instead"
    )
    names = {field.name for field in fields(Rates)}
    set_ones = {name: v for name, v in given.items() if name in names and v is not None}
    rates = replace(GPUS[gpu].rates, **set_ones)
    rates.validate()
    return rates
