"""The tables of docs/scaling.md: the fastest layout of published targets on 1, 4 and 16 nodes, and
how a step grows. Arithmetic at stated rates; nothing runs on a GPU.

    python tools/scaling_tables.py [--page docs/scaling.md] [--gpu h100 ...] [section.key=value ...]

With `--page` the tables are put into the page, between the marks that it has for them.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dspark_megatron.cli.machine_arguments import add_machine, given_machine
from dspark_megatron.errors import ConfigError, printable, require

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TARGETS = [
    "qwen3-8b",
    "qwen3-32b",
    "llama-3.1-70b",
    "qwen3-235b-a22b",
    "llama-3.1-405b",
    "deepseek-v3",
]
MILLION = 10**6
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tables of time and cost by target and machine.")
    add = parser.add_argument
    add("--targets", nargs="*", default=TARGETS, help="names of recipes in examples/, or folders")
    add("--nodes", nargs="*", type=int, default=[1, 4, 16])
    add("--grow", default="llama-3.1-70b", help="the target whose growth is shown")
    add("--grow-nodes", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32])
    add("--lengths", nargs="*", type=int, default=[1024, 2048, 4096, 8192, 16384, 32768])
    add("--anchors", nargs="*", type=int, default=[128, 256, 512, 1024])
    add("--at-nodes", type=int, default=4, help="for growth with length and anchors")
    add("--page", type=Path, help="put the tables there, not on stdout")
    add_machine(parser)
    add("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    try:
        if args.page is None:
            for line in tables(args):
                print(line, flush=True)
        else:
            fill(args.page, args)
    except ConfigError as error:
        sys.exit(f"error: {printable(str(error))}")


def fill(page: Path, args: argparse.Namespace) -> None:
    """Put the tables between the page's marks."""
    from dspark_megatron.storage.writing import write_text

    before, after = around_tables(page)
    text = "\n".join(tables(args))
    write_text(page, f"{before}\n{text}\n{after}")


def tables(args: argparse.Namespace) -> Iterator[str]:
    machine = given_machine(args, nodes=args.at_nodes)
    yield f"Rates of a GPU: {machine.rates.words()}."
    yield f"{machine.gpu_memory_gib:g} GiB a GPU, {machine.gpus_per_node} GPUs a node."
    settings = ", ".join(args.overrides) or "a step of 512 samples of 4,096 tokens"
    yield f"Where a row does not say otherwise: {settings}.\n"
    rows = [
        {"target": Path(target).name, "nodes": nodes, **row(args, target, nodes=nodes)}
        for target in args.targets
        for nodes in args.nodes
    ]
    yield from table("Targets", rows)
    grown = [{"nodes": n, **row(args, args.grow, nodes=n)} for n in args.grow_nodes]
    yield from table(f"Ranks: {args.grow}", grown)
    for title, key, values in (
        ("Length", "data.max_length", args.lengths),
        ("Anchors", "model.num_anchors", args.anchors),
    ):
        rows = [{key: v, **row(args, args.grow, f"{key}={v}", nodes=args.at_nodes)} for v in values]
        yield from table(f"{title}: {args.grow} on {args.at_nodes} nodes", rows)


def row(args: argparse.Namespace, target: str, *overrides: str, nodes: int) -> dict[str, Any]:
    """The fastest layout that fits, or what the leanest takes; said as it is found."""
    found = _row(args, target, *overrides, nodes=nodes)
    what = f"{Path(target).name}, {nodes} node(s) {' '.join(overrides)}"
    print(f"{what}: {', '.join(map(str, found.values()))}", file=sys.stderr, flush=True)
    return found


def _row(args: argparse.Namespace, target: str, *overrides: str, nodes: int) -> dict[str, Any]:
    from dspark_megatron.planning.cost.store import store_cost
    from dspark_megatron.planning.layouts import NothingFits, layout_words
    from dspark_megatron.planning.recommend import Wish, reading_layout, search

    machine = given_machine(args, nodes=nodes)
    folder, keys = target, [*args.overrides, *overrides]
    if target in TARGETS:
        folder, keys = str(EXAMPLES / "public_configs" / target), [*recipe_keys(target), *keys]
    try:
        done = search(Wish(folder, overrides=keys), machine)
    except NothingFits as error:
        return {"layout": str(error).partition(";")[0]}
    best = done.best
    reader = reading_layout(done)
    cost = store_cost(best.plan, best.time, reader.time, MILLION, machine.rates)
    parts = best.time.parts
    epoch = MILLION / best.plan.config.train.global_batch_size * best.time.total / 3600
    return {
        "layout": layout_words(best.plan),
        "GiB": f"{best.memory.total / 2**30:.1f}",
        **{f"{name}, s": f"{part.total:.2f}" for name, part in parts.items()},
        "of it sent, s": f"{sum(part.waited for part in parts.values()):.2f}",
        "step, s": f"{best.time.total:.2f}",
        "tokens/s a GPU": f"{best.tokens_per_second / machine.world_size:,.0f}",
        "GPU-hours a million samples": f"{epoch * machine.world_size:,.0f}",
        "a store pays from epoch": cost.break_even or "never",
    }


def recipe_keys(target: str) -> list[str]:
    """The draft of the target's recipe."""
    recipe = yaml.safe_load((EXAMPLES / f"{target}.yaml").read_text(encoding="utf-8"))
    return [f"model.{key}={json.dumps(value)}" for key, value in recipe["model"].items()]


def table(title: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    names = list(max(rows, key=len))
    yield f"### {title}\n"
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for one in rows:
        yield f"| {' | '.join(str(one.get(name, '')) for name in names)} |"
    yield ""


def around_tables(page: Path) -> tuple[str, str]:
    """The page up to the first of its marks, and from the second one on."""
    require(page.is_file(), f"--page {page} must be a file with marks for the tables")
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    require(bool(begin and end), f"--page {page} must have {BEGIN.strip()} and {END}")
    return before + begin, end + after


if __name__ == "__main__":
    main()
