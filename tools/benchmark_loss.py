"""Peak memory and time of the head loss, forward and backward, against plain ways to compute it.

    torchrun --nproc-per-node 4 tools/benchmark_loss.py [--rows 1792 --vocab 49152 ...]
    python tools/benchmark_loss.py                                  (one rank)

plain         `plain_head_loss` of the tests by autograd, on one rank
recompute     the same on chunks of rows under torch.utils.checkpoint, on one rank
head_loss     ours, on the first t ranks for each t of --tp
capped        the same with a soft cap of draft and target (--softcap), within the same budget
--objectives  each term of loss.terms beside 0.1 CE, D-PACE and D-PARD, against the default of 0.1
              CE and 0.9 L1, on all ranks: on a CPU the processor time of the first one
products      only the matrix products that no such loss can do without: the time to compare with

Memory is what a rank takes at its highest above the inputs. The gradients of the first three are
compared before anything is measured, and those of `capped` and of each objective with plain ones of
the same cap or objective.

Shapes: n rows, h hidden, r Markov rank, v/t columns of a rank.
"""

import argparse
import functools
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import benchmarking
import torch
import torch.distributed as dist
from loss_variants import DEFAULT, OBJECTIVES, Case, Problem, Products
from torch import Tensor

from dspark_megatron.run.ranks.runtime import Runtime, launch, start

NAMES = ("hidden", "latent", "w2")
VARIANTS = ("plain", "recompute", "head_loss", "capped", "products in chunks", "products")
Sized = tuple[str, int]
"""A variant and its tensor-parallel size."""
FORMATS = {"variant": "", "tp": "d", "MiB per rank": ",.1f", "memory / plain": ".3f"}
FORMATS |= {"ms": ",.1f", "time / products": ".3f", "time / plain": ".3f"}
OBJECTIVE_FORMATS = {"objective": "", "tp": "d", "ms": ",.1f", "time / default": ".3f"}
OBJECTIVE_FORMATS |= {"MiB per rank": ",.1f", "memory / default": ".3f"}


def check_gradients(
    problem: Problem,
    gradients: tuple[Tensor, ...],
    expected: list[Tensor],
    dtype: str,
    objective: str = "default",
) -> None:
    """Raise ValueError where gradients are not the plain ones: nothing else is worth a time."""
    tolerance = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
    columns = slice(problem.shard.vocab_start_index, problem.shard.vocab_end_index)
    for name, got, whole in zip(NAMES, gradients, expected, strict=True):
        want = (whole[columns] if name == "w2" else whole).float()
        error = float((got.float() - want).norm() / want.norm())
        if not error < tolerance:
            raise ValueError(
                f"objective {objective}: the gradient of {name} at TP {problem.group.size()} is "
                f"{error:.1e} from the plain one (relative norm), more than {tolerance:.0e}"
            )


def plain_gradients(
    runtime: Runtime,
    problem: Problem | None,
    args: argparse.Namespace,
    softcapping: float | None = None,
    case: Case = DEFAULT,
) -> list[Tensor]:
    """The gradients by `plain`, from the first rank to all. Three broadcasts."""
    dtype = benchmarking.DTYPES[args.dtype]
    shapes = [(args.rows, args.hidden), (args.rows, args.rank), (args.vocab, args.rank)]
    if runtime.is_main:
        gradients = list(problem.plain(softcapping, case))
    else:
        gradients = [torch.empty(shape, dtype=dtype, device=runtime.device) for shape in shapes]
    for gradient in gradients:
        dist.broadcast(gradient, 0)
    return gradients


def make_calls(problems: dict[int, Problem], sizes: list[int], rows: int) -> dict[Sized, Callable]:
    """What this rank does for each case, in the same order on all; nothing beyond the first t."""
    calls: dict[Sized, Callable] = {}
    for tp in sizes:
        problem = problems.get(tp)
        cases = {} if problem is None else {"head_loss": problem.head_loss}
        if problem is not None:
            cases["capped"] = problem.capped
            cases["products in chunks"] = Products(problem, problem.chunk_rows)
            cases["products"] = Products(problem, rows)
            if tp == 1:
                cases |= {"plain": problem.plain, "recompute": problem.recompute}
        for name in VARIANTS if tp == 1 else VARIANTS[2:]:
            calls[name, tp] = cases.get(name, _nothing)
    return calls


def _nothing() -> None: ...


def measure(runtime: Runtime, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the table. Every rank calls it; a rank beyond the first t sleeps meanwhile."""
    device = runtime.device
    sizes = sorted({1, *(t for t in args.tp if t <= runtime.world_size)})
    groups = {t: dist.new_group(list(range(t))) for t in sizes}
    waiting = dist.new_group(backend="gloo")  # waiting on NCCL would keep a core busy
    barrier = functools.partial(dist.barrier, group=waiting)
    problems = {t: Problem(args, groups[t], device) for t in sizes if runtime.rank < t}
    expected = plain_gradients(runtime, problems.get(1), args)
    capped = plain_gradients(runtime, problems.get(1), args, args.softcap)
    for problem in problems.values():
        check_gradients(problem, problem.head_loss(), expected, args.dtype)
        check_gradients(problem, problem.capped(), capped, args.dtype)
    if runtime.is_main:
        check_gradients(problems[1], problems[1].recompute(), expected, args.dtype)
    calls = make_calls(problems, sizes, args.rows)
    peaks = {
        case: benchmarking.peak_memory(call, device, barrier=barrier)
        for case, call in calls.items()
        if not case[0].startswith("products")
    }
    figures = torch.tensor(list(peaks.values()))
    dist.all_reduce(figures, op=dist.ReduceOp.MAX, group=waiting)
    seconds = benchmarking.interleaved_seconds(calls, device, rounds=args.rounds, barrier=barrier)
    return table_rows(seconds, dict(zip(peaks, figures.tolist(), strict=True)))


def table_rows(seconds: dict[Sized, float], peaks: dict[Sized, int]) -> list[dict[str, Any]]:
    rows = []
    for (name, tp), time in seconds.items():
        if name == "products in chunks":  # whichever is faster stands for both
            continue
        products = min(seconds["products", tp], seconds["products in chunks", tp])
        row = {"variant": name, "tp": tp, "ms": 1e3 * (products if name == "products" else time)}
        row["time / products"] = row["ms"] / (1e3 * products)
        row["time / plain"] = row["ms"] / (1e3 * seconds["plain", 1])
        if (name, tp) in peaks:
            row["MiB per rank"] = peaks[name, tp] / benchmarking.MIB
            row["memory / plain"] = peaks[name, tp] / peaks["plain", 1]
        rows.append(row)
    return rows


def measure_objectives(runtime: Runtime, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a table: each objective on all ranks, taking turns with the default."""
    device = runtime.device
    problem = Problem(args, runtime.tp_group, device)
    check_objectives(runtime, problem, args)
    calls = {
        name: functools.partial(problem.head_loss, case=case) for name, case in OBJECTIVES.items()
    }
    peaks = {name: benchmarking.peak_memory(call, device) for name, call in calls.items()}
    clock = process_time if device.type == "cpu" else perf_counter
    memory = max(peaks["default"], 1)  # a tiny problem may fit in what has been freed
    seconds = benchmarking.interleaved_seconds(calls, device, rounds=args.rounds, clock=clock)
    return [
        {
            "objective": name,
            "tp": runtime.tp_group.size(),
            "ms": 1e3 * time,
            "time / default": time / seconds["default"],
            "MiB per rank": peaks[name] / benchmarking.MIB,
            "memory / default": peaks[name] / memory,
        }
        for name, time in seconds.items()
    ]


def check_objectives(runtime: Runtime, problem: Problem, args: argparse.Namespace) -> None:
    """`check_gradients` of each."""
    alone = dist.new_group([0])
    whole = Problem(args, alone, runtime.device) if runtime.is_main else None
    for name, case in OBJECTIVES.items():
        expected = plain_gradients(runtime, whole, args, case=case)
        check_gradients(problem, problem.head_loss(case=case), expected, args.dtype, name)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory and time of the head loss.")
    parser.add_argument("--rows", type=int, default=1792, help="supervised slots")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rank", type=int, default=256, help="of the Markov head")
    parser.add_argument("--dtype", choices=benchmarking.DTYPES, default="float32")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-budget-mb", type=int, default=256, help="as in a config")
    parser.add_argument("--chunk-rows", type=int, help="as in a config; before the budget")
    parser.add_argument("--softcap", type=float, default=30.0, help="of `capped`")
    parser.add_argument("--compile", action="store_true", help="head_loss with torch.compile")
    parser.add_argument(
        "--objectives", action="store_true", help="time each term of loss.terms instead"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    benchmarking.add_report_options(parser)
    args = parser.parse_args(argv)
    bad = [t for t in args.tp if args.vocab % t]
    if bad:
        parser.error(f"--vocab ({args.vocab}) must be divisible by each of --tp: not by {bad}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    benchmarking.give_tensors_own_pages()
    with launch() as job:
        runtime = start(job, job.world_size if args.objectives else 1)
        if args.objectives:
            rows, formats = measure_objectives(runtime, args), OBJECTIVE_FORMATS
        else:
            rows, formats = measure(runtime, args), FORMATS
        tables = {"head loss, forward and backward": (rows, formats)}
        if runtime.is_main:
            print(benchmarking.report(tables, runtime.device, args.json))


if __name__ == "__main__":
    main()
