"""What a verification step costs on some machine: steps per second (SPS) by verified tokens.

Files are SGLang's (`--speculative-dspark-sps-table-path`), in both of its forms. A table is of one
machine, target, layout and context length, and never part of a checkpoint.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark_megatron.bounded_text import read_json
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.writing import write_json


@dataclass(frozen=True)
class SampledSps:
    """Measured points with floor look-up: a number of tokens between two points costs what the
    lower one does. Below the first point the first one counts; see `check_range` for above."""

    sample_batch_tokens: list[int]
    """Strictly increasing numbers of verified tokens, at least 2."""
    sample_steps_per_sec: list[float]
    """Of each of them."""
    max_batch_tokens: int
    """Up to which number of tokens SGLang reads the table, repeating its last point; at least
    that."""

    def __post_init__(self) -> None:
        _check_points("sample_batch_tokens", self.sample_batch_tokens, at_least=2)
        _check_values("sample_steps_per_sec", self.sample_steps_per_sec, self.sample_batch_tokens)
        require(
            all(x > 0 for x in self.sample_steps_per_sec),
            f"sample_steps_per_sec must be positive, is {self.sample_steps_per_sec}",
        )
        require(
            type(self.max_batch_tokens) is int
            and self.max_batch_tokens >= self.sample_batch_tokens[-1],
            f"max_batch_tokens ({self.max_batch_tokens}) must be an integer >= the last point of "
            f"sample_batch_tokens ({self.sample_batch_tokens[-1]})",
        )

    @property
    def last_point(self) -> int:
        """The largest number of tokens that was measured."""
        return self.sample_batch_tokens[-1]

    @property
    def max_requests(self) -> float:
        """Up to how many requests the table holds: their number does not matter."""
        return math.inf

    def steps_per_second(self, tokens: Tensor, requests: int) -> Tensor:
        """tokens [n] int64 -> fp64 [n]; the number of requests does not matter."""
        points = torch.tensor(self.sample_batch_tokens)
        place = torch.bucketize(tokens, points, right=True) - 1
        return torch.tensor(self.sample_steps_per_sec, dtype=torch.float64)[place.clamp(min=0)]


@dataclass(frozen=True)
class AdditiveSps:
    """Seconds of a step as `bias + alpha(requests) + theta(tokens)`, both of them straight lines
    between their points and constant outside."""

    bias_seconds: float
    """Positive."""
    bs_probes: list[int]
    """Strictly increasing numbers of requests, at least 1."""
    alpha_seconds: list[float]
    """Of each of them, >= 0."""
    m_probes: list[int]
    """Strictly increasing numbers of verified tokens, anchors included; at least 2."""
    theta_seconds: list[float]
    """Of each of them, >= 0."""

    def __post_init__(self) -> None:
        _check_values("bias_seconds", [self.bias_seconds], [0])
        require(self.bias_seconds > 0, f"bias_seconds ({self.bias_seconds}) must be positive")
        _check_points("bs_probes", self.bs_probes, at_least=1)
        _check_values("alpha_seconds", self.alpha_seconds, self.bs_probes)
        _check_points("m_probes", self.m_probes, at_least=2)
        _check_values("theta_seconds", self.theta_seconds, self.m_probes)

    @property
    def last_point(self) -> int:
        """The largest number of tokens that was measured."""
        return self.m_probes[-1]

    @property
    def max_requests(self) -> float:
        """Up to how many requests the table holds; a single point is a cost that all have."""
        return self.bs_probes[-1] if len(self.bs_probes) > 1 else math.inf

    def steps_per_second(self, tokens: Tensor, requests: int) -> Tensor:
        """tokens [n] int64 -> fp64 [n]."""
        alpha = np.interp(requests, self.bs_probes, self.alpha_seconds)
        theta = np.interp(tokens.numpy(), self.m_probes, self.theta_seconds)
        return 1 / torch.from_numpy(self.bias_seconds + alpha + theta)


SpsTable = SampledSps | AdditiveSps


def sps_of_step(table: SpsTable, requests: int, num_draft_tokens: int) -> Tensor:
    """SPS when R, R + 1, ..., R*(k + 1) tokens are verified, as ops/prefix_scheduler.py wants it.
    -> fp64 [R*k + 1]. ConfigError beyond the table: SGLang's look-up repeats the last point there,
    which would make all further tokens free."""
    most = requests * (num_draft_tokens + 1)
    for what, wanted, end in (
        ("verified tokens", most, table.last_point),
        ("requests", requests, table.max_requests),
    ):
        require(
            wanted <= end,
            f"{requests} requests of {num_draft_tokens} slots need a table of steps per second for "
            f"{wanted} {what}, and it ends at {end}; measure more or take fewer requests",
        )
    return table.steps_per_second(torch.arange(requests, most + 1), requests)


def interpolated(table: SpsTable) -> AdditiveSps:
    """The same points, joined by straight lines in seconds; an additive table is so already."""
    if isinstance(table, AdditiveSps):
        return table
    seconds = [1 / x for x in table.sample_steps_per_sec]
    bias = min(seconds)
    return AdditiveSps(
        bias_seconds=bias,
        bs_probes=[1],
        alpha_seconds=[0.0],
        m_probes=table.sample_batch_tokens,
        theta_seconds=[x - bias for x in seconds],
    )


def measured_table(token_seconds: dict[int, float], request_seconds: dict[int, float]) -> SpsTable:
    """The table of measured steps. token_seconds: by the tokens of one request that are verified.
    request_seconds: by requests of one token each; a step of R of them costs alpha(R) more than R
    tokens of one request (not less, whatever noise may say). Without any, the table is sampled."""
    points = sorted(token_seconds)
    rates = [1 / token_seconds[n] for n in points]
    sampled = SampledSps(points, rates, max_batch_tokens=points[-1])
    if not request_seconds:
        return sampled
    lines, counts = interpolated(sampled), sorted(request_seconds)
    alone = 1 / lines.steps_per_second(torch.tensor(counts), requests=1)
    alpha = [max(0.0, request_seconds[n] - x) for n, x in zip(counts, alone.tolist(), strict=True)]
    return replace(lines, bs_probes=[1, *counts], alpha_seconds=[0.0, *alpha])


def read_sps_table(path: str | Path) -> SpsTable:
    """ConfigError when the file is not one of SGLang's two forms."""
    found = read_json(path)
    keys = {form: [field.name for field in fields(form)] for form in (SampledSps, AdditiveSps)}
    for form, names in keys.items():
        if found.keys() == set(names):
            return _built(form, found, path)
    raise ConfigError(
        f"{path} must have exactly the keys {keys[SampledSps]} or {keys[AdditiveSps]}, has "
        f"{list(found)}; `dspark served measure` writes such a table"
    )


def write_sps_table(path: Path, table: SpsTable) -> None:
    """Write the JSON whole or not at all."""
    write_json(path, asdict(table))


def _built(form: type, values: dict[str, Any], path: str | Path) -> SpsTable:
    try:
        return form(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_points(name: str, points: Any, *, at_least: int) -> None:
    """`points` are strictly increasing positive integers."""
    require(
        isinstance(points, list)
        and len(points) >= at_least
        and all(type(x) is int for x in points)
        and points == sorted(set(points))
        and points[0] >= 1,
        f"{name} must be a list of at least {at_least} strictly increasing integers >= 1, is "
        f"{points}",
    )


def _check_values(name: str, values: Any, points: list[int]) -> None:
    """`values` are finite numbers >= 0, one for each point."""
    require(
        isinstance(values, list)
        and len(values) == len(points)
        and all(type(x) in (int, float) and 0 <= x < math.inf for x in values),
        f"{name} must hold {len(points)} finite number(s) >= 0, is {values}",
    )
