"""The plan of a draft's step held against real steps: memory at its highest, bytes of collectives.

    torchrun --nproc-per-node 4 tools/benchmark_plan.py [--hidden 256] [--json FILE]

The plan runs a step on the meta device, here with the kernels of a CPU. The real one runs on CPUs
over gloo: its memory is what PyTorch's profiler sees of the allocator, and its bytes are those of
the collectives that it calls. Stops where bytes differ at all, or memory by more than a twentieth.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import benchmarking
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config

from dspark_megatron.config.loading import config_from_dict
from dspark_megatron.planning.observing.work import Sent
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.ranks.runtime import Runtime, launch
from dspark_megatron.shape import draft_shape

MICRO_BATCHES = 2
FORMATS = {"tp": "d", "dp": "d", "variant": "", "planned MiB": ",.2f", "real MiB": ",.2f"}
FORMATS |= {"planned / real": ".3f", "sent KiB": ",.1f", "collectives": "d"}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
BY_KIND = {"tp": "d", "variant": "", **dict.fromkeys(KINDS, ",d"), "on a ring": ",d"}


@dataclass(frozen=True)
class Sizes:
    hidden: int = 256
    vocab: int = 8192
    tokens: int = 512
    anchors: int = 48
    layers: int = 2


SPLIT = {"parallel.sequence_parallel": True}
RECOMPUTE = {"train.recompute_activations": True}
OTHER_TERMS = ("reverse_kl", "js", "renyi_half", "lk_alpha", "lk_hybrid")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"train.dtype": "bfloat16"},
    "recompute": RECOMPUTE,
    "whole optimizer": {"optimizer.use_distributed_optimizer": False},
    "Muon": {"optimizer.name": "muon"},
    "overlap": {"optimizer.overlap_grad_reduce": True},
    "gated head": {"model.markov_head_type": "gated"},
    "rnn head": {"model.markov_head_type": "rnn"},
    "no heads": {"model.markov_rank": 0, "model.enable_confidence_head": False},
    "KL": {"loss.terms": {"ce": 0.1, "l1": 0.9, "kl": 0.5}, "loss.ce_labels": "target_argmax"},
    "other distances": {
        "loss.terms": dict.fromkeys(
            ("reverse_kl", "js", "renyi_half", "lk_alpha", "lk_hybrid"), 0.2
        )
    },
    "labels alone": {"loss.terms": {"ce": 1.0}, "model.enable_confidence_head": False},
    "windows": {"model.attention": {"window": 24, "causal": "sliding"}},
    "one window, sinks, biases": {
        "model.attention": {"window": 24, "sliding_layers": [1], "sink": True, "biases": True}
    },
    "sequence parallel": SPLIT,
    "sequence parallel, recompute": SPLIT | RECOMPUTE,
}


def step_plan(sizes: Sizes, tp: int, dp: int, variant: str) -> RunPlan:
    """A run that needs no files: of a target that is its config alone."""
    target = Qwen3Config(
        hidden_size=sizes.hidden,
        intermediate_size=4 * sizes.hidden,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=sizes.hidden // 8,
        vocab_size=sizes.vocab,
        max_position_embeddings=sizes.tokens,
    )
    sections: dict[str, dict[str, Any]] = {
        "target": {"path": "none", "dtype": "float32"},
        "model": {"target_layer_ids": [1, 3, 5], "mask_token_id": 5, "markov_rank": 64},
        "data": {"train_files": ["none"], "max_length": sizes.tokens},
        "parallel": {"tensor_parallel": tp},
        "loss": {"memory_budget_mb": 4},
        "train": {"output_dir": "none", "iterations": 1, "micro_batch_size": 1},
        "optimizer": {},
    }
    sections["model"] |= {"num_anchors": sizes.anchors, "num_layers": sizes.layers}
    sections["train"] |= {"global_batch_size": MICRO_BATCHES * dp, "dtype": "float32"}
    for key, value in VARIANTS[variant].items():
        section, name = key.split(".")
        sections[section][name] = value
    config = config_from_dict(sections)
    config.validate()
    return RunPlan(config, target, draft_shape(config.model, target), dp)


@dataclass(frozen=True)
class Figures:
    held: int
    """Bytes, from the start of a run to its end."""
    highest: int
    """Bytes at the highest moment of a step, those among them."""
    sent: tuple[Sent, ...]
    """Of a step; calls are not compared, since PyTorch has no coalesced collectives on meta."""

    @property
    def bytes_by_group(self) -> dict[tuple[str, str, int], int]:
        return {(one.kind, one.group, one.size): one.handed for one in self.sent}


def planned(plan: RunPlan) -> Figures:
    """In a process that has joined no ranks."""
    from dspark_megatron.planning.observing.cpu_kernels import cpu_kernels
    from dspark_megatron.planning.on_paper.observation import observe_on_paper

    found = observe_on_paper(plan, cpu_kernels)
    work = found.once
    for one in found.micro_batch.values():
        work += one.times(MICRO_BATCHES)
    moments = [sum(parts.values()) for parts in found.moments.values()]
    return Figures(sum(found.held.values()), max(moments), work.sent)


def measured(runtime: Runtime, plan: RunPlan) -> Figures:
    """A real step of this rank; all of them call."""
    from dspark_megatron.model.layer_specs import local_layer_spec
    from dspark_megatron.planning.observing.observer import Observer
    from dspark_megatron.planning.observing.work import summed
    from dspark_megatron.planning.on_paper.draft_step import DraftStep
    from dspark_megatron.planning.on_paper.micro_batch import full_micro_batch
    from dspark_megatron.planning.on_paper.observation import group_words
    from dspark_megatron.run.build import empty_draft

    observer = Observer(runtime.device, group_words(runtime))

    def build() -> DraftStep:
        draft = empty_draft(plan, runtime, local_layer_spec(plan.shape.architecture))
        draft.init_weights(seed=1, std=0.02)
        draft.load_frozen_replicas(*(torch.zeros_like(draft.lm_head) for _ in range(2)))
        return DraftStep(plan, runtime, draft, observer)

    gc.collect()  # what is left of the step before is not freed within this one
    step, held, _ = allocated(build)
    batches = [full_micro_batch(plan) for _ in range(MICRO_BATCHES)]
    step.run(batches)  # a run's first step may allocate what it then keeps
    gc.collect()
    # Of one micro-batch: gloo's threads let go of what they have summed when they get to it.
    _, _, on_top = allocated(lambda: step.run(batches[:1]))
    with observer:
        step.run(batches)
    sent = summed(tuple(one for work in observer.work.values() for one in work.sent))
    return Figures(held, held + on_top, sent)


def allocated(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """What a call returns, bytes that are allocated more when it is through, and at the highest."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    results: Any = profiled.profiler
    total = highest = 0
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            highest = max(highest, total)
    return result, total, highest


def check(plan: Figures, real: Figures, what: str) -> None:
    """ValueError where the plan is not what happened."""
    if plan.bytes_by_group != real.bytes_by_group:
        raise ValueError(f"{what}: planned {plan.bytes_by_group}, sent {real.bytes_by_group}")
    for name in ("held", "highest"):
        ours, theirs = getattr(plan, name), getattr(real, name)
        if abs(ours - theirs) > theirs / 20:
            raise ValueError(f"{what}: planned {ours:,} bytes {name}, allocated {theirs:,}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The plan of a draft's step against real steps.")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for name, size in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    sizes = Sizes(**{name: getattr(args, name) for name in asdict(Sizes())})
    with launch() as job:
        if torch.cuda.is_available():
            raise ValueError("a step with kernels of a CPU is planned; hide the GPUs")
        plans = {
            (tp, name): step_plan(sizes, tp, job.world_size // tp, name)
            for tp in args.tp
            if job.world_size % tp == 0
            for name in args.variants
            if tp > 1 or not name.startswith("sequence parallel")
        }
        expected = {key: planned(plan) for key, plan in plans.items()}
        rows, by_kind = [], []
        for runtime in benchmarking.runtime_of_each_size(job, args.tp):
            tp = runtime.tp_group.size()
            for (size, name), plan in plans.items():
                if size == tp:
                    real = measured(runtime, plan)
                    check(expected[tp, name], real, f"TP {tp}, {name}")
                    rows.append(row(tp, runtime.dp_group.size(), name, expected[tp, name], real))
                    by_kind.append({"tp": tp, "variant": name, **tensor_parallel(real)})
        if runtime.is_main:
            tables = {
                "a step of one micro-batch, sent in two, a rank": (rows, FORMATS),
                "bytes handed to the draft's tensor-parallel group": (by_kind, BY_KIND),
            }
            print(benchmarking.report(tables, runtime.device, args.json))


def row(tp: int, dp: int, variant: str, plan: Figures, real: Figures) -> dict[str, Any]:
    return {
        "tp": tp,
        "dp": dp,
        "variant": variant,
        "planned MiB": plan.highest / benchmarking.MIB,
        "real MiB": real.highest / benchmarking.MIB,
        "planned / real": plan.highest / real.highest,
        "sent KiB": sum(one.sent for one in real.sent) / 1024,
        "collectives": sum(one.calls for one in real.sent),
    }


def tensor_parallel(real: Figures) -> dict[str, int]:
    """Bytes by kind."""
    own = [one for one in real.sent if one.group == "draft, tensor-parallel"]
    found = {kind: sum(x.handed for x in own if x.kind == kind) for kind in KINDS}
    return found | {"on a ring": sum(one.sent for one in own)}


if __name__ == "__main__":
    main()
