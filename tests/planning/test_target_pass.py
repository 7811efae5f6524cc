"""A target's pass as planned: compared with what real targets send and allocate on the CPU."""

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from dspark_megatron.config import TargetConfig
from dspark_megatron.data.batch import Batch
from dspark_megatron.planning.observing.cpu_kernels import cpu_kernels
from dspark_megatron.planning.target import observed
from dspark_megatron.planning.target import plan as target_plan
from dspark_megatron.planning.target.gpt import ObservedGPT
from dspark_megatron.planning.target.observed import ObservedTarget
from dspark_megatron.planning.target.plan import target_pass
from dspark_megatron.planning.target.target_pass import LAYER
from dspark_megatron.run.check import check
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.huggingface.split import TargetSplit
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget
from dspark_megatron.targets.megatron.gpt_shape import gpt_shape_of
from dspark_megatron.targets.megatron.groups import target_groups
from dspark_megatron.targets.megatron.source import GPTSource
from dspark_megatron.targets.megatron.target import MegatronTarget
from support.target_families import FAMILIES, make_family
from support.target_families import SIZES as FAMILY_SIZES
from support.tiny_target import tiny_config

TAPS = (0, 2)
BATCH = (2, 192)
SIZES = dict(hidden_size=128, intermediate_size=256, max_position_embeddings=256)
"""Large enough for states to outweigh what is rounded up."""


class Handed(TorchDispatchMode):
    """Bytes handed to collectives, by the operator's name."""

    NAMES = {
        "allreduce_": "all-reduce",
        "all_reduce": "all-reduce",
        "all_reduce_": "all-reduce",
        "_allgather_base_": "all-gather",
        "all_gather_into_tensor": "all-gather",
        "_reduce_scatter_base_": "reduce-scatter",
        "alltoall_base_": "all-to-all",
        "all_to_all_single": "all-to-all",
    }

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name in self.NAMES:
            first = args[1] if name.endswith("base_") else args[0]
            tensors = first if isinstance(first, list) else [first]
            kind = self.NAMES[name]
            self.bytes[kind] = self.bytes.get(kind, 0) + sum(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))


def peak_bytes(call):
    """The highest sum of what the CPU's allocator gives and takes back while it runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    del result
    return peak


def evenly(experts, args):
    """Tokens go to all experts in turn, as the plan has it."""
    hidden, chosen, *rest = args
    numbers = torch.arange(chosen.numel()) % experts.config.num_experts
    return hidden, numbers.view_as(chosen), *rest


def target_config(path, max_tokens):
    attention = "eager" if load_target_config(path).model_type == "gpt_oss" else "sdpa"
    return TargetConfig(path=str(path), max_tokens_per_forward=max_tokens, attention=attention)


def run_really(runtime, path, split, max_tokens):
    target = HuggingFaceTarget(
        target_config(path, max_tokens),
        TAPS,
        split=split,
        dp_group=None,  # else 8 bytes more, to agree on the number of passes
        device=runtime.device,
    )
    if split.ep_size > split.tp_size:
        for module in target.model.modules():
            if type(module).__name__.endswith("Experts"):
                module.register_forward_pre_hook(evenly)
    batch = Batch(torch.arange(BATCH[0] * BATCH[1]).view(BATCH) % 300)
    target.states(batch)  # what the first pass gathers and keeps
    with Handed() as handed:
        target.states(batch)
    # gloo's threads may keep what they have sent for a moment longer, and on a busy machine the
    # profiler may lose events: neither the highest nor the lowest figures are true.
    peaks = sorted(peak_bytes(lambda: target.states(batch)) for _ in range(15))
    return handed.bytes, peaks[3]


def planned(path, split, max_tokens):
    config, own = target_config(path, max_tokens), load_target_config(path)
    wish = ObservedTarget(config, own, torch.float32, split, TAPS, True, cpu_kernels)
    return wish.forward_pass(BATCH)


@pytest.mark.parametrize(
    "family, split, max_tokens",
    [
        ("llama", (1, 1, 1, 1), None),
        ("llama", (1, 1, 1, 1), 100),
        ("qwen3", (2, 1, 1, 1), None),
        ("llama", (1, 2, 2, 1), None),
        ("qwen3_moe", (2, 1, 1, 1), None),
        ("mixtral", (2, 1, 1, 2), None),
        ("qwen3_moe", (1, 2, 2, 2), None),
        ("deepseek_v3", (2, 2, 2, 1), 200),
        ("gpt_oss", (1, 1, 1, 1), None),
    ],
)
def test_a_planned_pass_is_that_of_a_real_target(pool, tmp_path, family, split, max_tokens):
    # A CPU has no fused attention for values of another width than keys.
    own = {"v_head_dim": 12} if family == "deepseek_v3" else {}
    path = make_family(tmp_path / "target", family, **SIZES, **own)
    split = TargetSplit(*split)
    world = split.tp_size * split.dp_size
    plan = planned(path, split, max_tokens)
    real = pool.run(
        run_really, world=world, tp=split.tp_size, path=path, split=split, max_tokens=max_tokens
    )
    compare(plan, real)


def compare(plan, real):
    sent = {}
    for one in plan.work.sent:
        sent[one.kind] = sent.get(one.kind, 0) + one.handed
    # gloo reduces and scatters in a copy of its input, and its threads may keep a tensor that was
    # sent for a moment longer than the pass does.
    held = [one.handed // one.calls for one in plan.work.sent]
    peak = sum(plan.highest.values())
    assert real[0][0] == sent  # other ranks hold less where a dimension is uneven
    for handed, taken in real:
        assert {kind: pytest.approx(size, rel=0.01) for kind, size in handed.items()} == sent
        assert 0.95 * peak < taken < 1.05 * peak + 2 * max(held, default=0)


def run_gpt_really(runtime, path, ep):
    source = GPTSource.open(
        TargetConfig(path=str(path), provider="megatron"), load_target_config(path)
    )
    groups = target_groups(tp_group=runtime.tp_group, ep_size=ep)
    target = MegatronTarget(
        source.model(groups, device=runtime.device), TAPS, with_output_layer=False
    )
    target._shape_group = None  # else two numbers more, for the ranks' sizes
    for module in target.model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(routed_evenly)
    batch = Batch(torch.arange(BATCH[0] * BATCH[1]).view(BATCH) % 300)
    with Handed() as handed:
        target.states(batch)
    return handed.bytes, min(peak_bytes(lambda: target.states(batch)) for _ in range(15))


def routed_evenly(router, _args, output):
    probabilities, chosen = output
    tokens, experts = chosen.shape
    even = torch.zeros_like(chosen)
    for place in range(router.topk):
        even[torch.arange(tokens), (torch.arange(tokens) * router.topk + place) % experts] = True
    return probabilities, even


@pytest.mark.parametrize(
    "family, tp, ep", [("llama", 1, 1), ("qwen3", 2, 1), ("qwen3_moe", 2, 2), ("qwen3_moe", 1, 2)]
)
def test_a_planned_pass_is_that_of_a_real_gpt_model(pool, tmp_path, family, tp, ep):
    path = make_family(tmp_path / "target", family, **SIZES)
    shape = gpt_shape_of(load_target_config(path))
    plan = ObservedGPT(
        shape, torch.float32, tp, ep, 1, False, TAPS, True, kernels=cpu_kernels
    ).forward_pass(BATCH)
    compare(plan, pool.run(run_gpt_really, world=max(tp, ep), tp=tp, path=path, ep=ep))


@pytest.mark.parametrize(
    "family, split, max_tokens",
    [
        ("llama", (2, 2, 2, 1), 64),
        ("deepseek_v3", (1, 2, 2, 2), None),
        ("gpt_oss", (1, 2, 2, 1), None),
    ],
)
def test_few_layers_tell_what_all_take(family, split, max_tokens):
    """Dense layers before those with experts; full and sliding attention in turns."""
    layers = {"num_hidden_layers": 14, "first_k_dense_replace": 3}
    config = AutoConfig.for_model(family, **{**FAMILY_SIZES, **FAMILIES[family], **layers})
    attention = "eager" if family == "gpt_oss" else "sdpa"
    settings = TargetConfig(path="-", attention=attention, max_tokens_per_forward=max_tokens)
    split = TargetSplit(*split)
    target = ObservedTarget(settings, config, torch.bfloat16, split, (1, 6), True)
    few, whole = target.forward_pass((2, 96)), target.observe((2, 96), 1, tuple(range(14)))
    assert few.highest == whole.highest
    assert few.work == whole.work


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mamba2", "nemotron_h", "qwen3_next"])
def test_other_families_are_observed(family):
    """Of their default sizes, which take seconds; without memory."""
    config = AutoConfig.for_model(family)
    attention = "sdpa" if family in ("gemma3_text", "nemotron_h", "qwen3_next") else "eager"
    settings, ids = TargetConfig(path="-", attention=attention), (0, 3)
    found = ObservedTarget(settings, config, torch.bfloat16, TargetSplit(), ids, True).forward_pass(
        (1, 128)
    )
    states = 3 * 128 * config.hidden_size * 2
    assert sum(found.highest.values()) > states and found.work.flops > 0 and not found.by_formula


def test_a_pass_that_goes_through_tokens_one_by_one_is_planned_by_formula(tiny_run, monkeypatch):
    monkeypatch.setattr(observed, "MOST_CALLS", 3)
    config = tiny_config(tiny_run)
    plan = check(config, 1, use="plan")
    target_plan._pass.cache_clear()
    found = target_pass(plan)
    target_plan._pass.cache_clear()
    assert "by formula: what a forward pass of the target" in found.by_formula[0]
    assert "(they go through tokens one by one)" in found.by_formula[0]
    assert torch.is_grad_enabled()
    assert found.highest[LAYER] > 0 and found.work.flops > 0 and found.work.moved > 0
