"""Drafts that start as layers of their target: which tensors, on which ranks, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.run.check import check
from dspark_megatron.run.initial.warm_start import WarmStart
from support.target_families import make_family, make_multimodal
from support.tiny_draft import assemble, layout_of
from support.tiny_target import make_target, tiny_config
from support.training_runs import assert_same_curve, curve, run_training

IDS = [3, 1]
PLAIN = ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")
"""Tensors of the target that Megatron does not fuse, in the order of the draft's."""
OURS = ("input_layernorm", "self_attention.linear_proj", "pre_mlp_layernorm", "mlp.linear_fc2")


def warm_config(tiny_run, path, ids=IDS, **sections):
    model = {"initialize_from_target_layers": ids, **sections.pop("model", {})}
    return tiny_config(tiny_run, target={"path": str(path)}, model=model, **sections)


def untrained(runtime, config, checkpoints=None):
    """Trained parameters of a draft before its first step, how they are split, and the report."""
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.checkpoints.saving import save_checkpoint
    from dspark_megatron.run.checkpoints.state import RunState
    from dspark_megatron.run.identity import export_settings, run_identity

    plan = check(config, runtime.world_size)
    draft, warm_start = build_draft(plan, runtime), WarmStart.open(plan)
    if warm_start is not None:
        warm_start.load(draft, tp_group=runtime.tp_group)
    if checkpoints is not None:
        meta = {"format": 1, **run_identity(plan), **export_settings(plan)}
        save_checkpoint(checkpoints, RunState(0, 0), meta, draft, optimizer=None, keep_last=1)
    trained = {n: p.detach() for n, p in draft.named_parameters() if p.requires_grad}
    return trained, layout_of(draft), warm_start and warm_start.describe()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def whole(pool, tiny_run, target):
    """On one rank: the draft that starts as layers of the target, and the one that does not."""
    configs = (warm_config(tiny_run, target), warm_config(tiny_run, target, []))
    return [pool.run(untrained, world=1, tp=1, config=config)[0][0] for config in configs]


def test_matrices_are_the_targets(whole, target):
    warm, cold = whole
    tensors = load_file(target / "model.safetensors")
    for i, layer in enumerate(IDS):
        there, here = f"model.layers.{layer}", f"layers.{i}"
        for theirs, ours in zip(PLAIN, OURS, strict=True):
            found = tensors[f"{there}.{theirs}.weight"]
            assert torch.equal(warm[f"{here}.{ours}.weight"], found), ours
        gate_up = [tensors[f"{there}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(warm[f"{here}.mlp.linear_fc1.weight"], torch.cat(gate_up))
        kv = warm[f"{here}.self_attention.linear_kv.weight"].view(4, 2, 8, 32)
        for part, name in enumerate("kv"):
            matrix = tensors[f"{there}.self_attn.{name}_proj.weight"]
            assert torch.equal(kv[:, part].flatten(0, 1), matrix)
    for name in warm:
        assert name.startswith("layers.") or torch.equal(warm[name], cold[name]), name


@pytest.mark.parametrize("world, tp", [(2, 2), (4, 4)])
def test_every_layout_starts_from_the_same(pool, tiny_run, target, whole, world, tp):
    config = warm_config(tiny_run, target, parallel={"tensor_parallel": tp})
    ranks = pool.run(untrained, world=world, tp=tp, config=config)
    found = assemble([rank[0] for rank in ranks], ranks[0][1])
    for name, tensor in whole[0].items():
        rows = tensor.shape[0]  # the vocabulary is padded
        assert torch.equal(found[name][:rows], tensor), name


def test_the_export_of_the_untrained_draft(pool, tiny_run, target, tmp_path):
    from dspark_megatron.conversion.export import export_checkpoint
    from dspark_megatron.conversion.folder_writer import WriteOptions

    config = warm_config(tiny_run, target, parallel={"tensor_parallel": 2})
    pool.run(untrained, world=2, tp=2, config=config, checkpoints=tmp_path / "checkpoints")
    options = WriteOptions(dtype=torch.float32)
    export = load_file(
        export_checkpoint(tmp_path, target, tmp_path / "export", options) / "model.safetensors"
    )
    tensors = load_file(target / "model.safetensors")
    of_layers = [name for name in export if name.startswith("layers.")]
    assert len(of_layers) == 2 * 11
    for name in of_layers:
        _, i, rest = name.split(".", 2)
        assert torch.equal(export[name], tensors[f"model.layers.{IDS[int(i)]}.{rest}"]), name


def test_training_starts_from_them_and_a_resume_does_not_look(pool, tiny_run, target, tmp_path):
    def run(output, tp, ids, minutes_ago=()):
        train = {"output_dir": str(output), "iterations": 3, "exit_duration_minutes": 1}
        parallel = {"tensor_parallel": tp}
        config = warm_config(tiny_run, target, ids, train=train, parallel=parallel)
        pool.run(run_training, world=tp, tp=tp, config=config, minutes_ago=minutes_ago)
        return curve(output)

    unbroken = run(tmp_path / "unbroken", 1, IDS)
    stopped = run(tmp_path / "stopped", 2, IDS, minutes_ago=[2, 2])
    assert_same_curve(stopped, unbroken[:1])
    assert_same_curve(run(tmp_path / "stopped", 2, [99]), unbroken)


def decoded_draft(runtime, config):
    from dspark_megatron.evaluation.command import build_decoder

    plan = check(config, runtime.world_size)
    decoder, _ = build_decoder(plan, runtime, None, torch.tensor([[5, 6, 7]]), None)
    return decoder.draft.layers[0].mlp.linear_fc2.weight.detach()


def test_evaluation_of_the_untrained_draft(pool, tiny_run, target, whole):
    (weight,) = pool.run(decoded_draft, world=1, tp=1, config=warm_config(tiny_run, target))
    assert torch.equal(weight, whole[0]["layers.0.mlp.linear_fc2.weight"])


def report_of(tiny_run, path, **sections):
    return WarmStart.open(check(warm_config(tiny_run, path, **sections), 1)).describe()


def test_llama_has_no_norms_of_queries_and_keys(tiny_run, tmp_path):
    report = report_of(tiny_run, make_target(tmp_path / "target", model_type="llama"))
    assert "the target's layers [3, 1]" in report
    assert "  not copied, the target has none: self_attn.q_norm, self_attn.k_norm" in report
    assert report.count("not copied") == 1


def test_biases_have_no_place(tiny_run, tmp_path):
    report = report_of(tiny_run, make_family(tmp_path / "target", "qwen2"))
    assert "no place in the draft: self_attn.q_proj.bias, self_attn.k_proj.bias" in report


def test_biases_are_taken_over_where_the_draft_has_them(pool, tiny_run, tmp_path):
    """Qwen2 has none for the output; ours starts at zero there."""
    path = make_family(tmp_path / "target", "qwen2")
    tensors = load_file(path / "model.safetensors")
    biases = {n: t + torch.randn(t.shape) for n, t in tensors.items() if n.endswith("bias")}
    save_file({**tensors, **biases}, path / "model.safetensors", {"format": "pt"})
    config = warm_config(tiny_run, path, model={"attention": {"biases": True}})
    ranks = pool.run(untrained, world=2, tp=2, config=config)
    found = assemble([rank[0] for rank in ranks], ranks[0][1])
    report = ranks[0][2]
    assert "no place" not in report and "has none: self_attn.q_norm, self_attn.k_norm" in report
    assert report.endswith("self_attn.o_proj.bias")
    for here, there in enumerate(IDS):
        mine = f"layers.{here}.self_attention"
        query, key, value = (biases[f"model.layers.{there}.self_attn.{x}_proj.bias"] for x in "qkv")
        assert torch.equal(found[f"{mine}.linear_q.bias"], query)
        fused = torch.stack([key.view(4, -1), value.view(4, -1)], dim=1).flatten()
        assert torch.equal(found[f"{mine}.linear_kv.bias"], fused)
        assert not found[f"{mine}.linear_proj.bias"].any()


def test_experts_stay_where_they_are(tiny_run, tmp_path):
    path = make_family(tmp_path / "target", "qwen3_moe", mlp_only_layers=[1])
    report = report_of(tiny_run, path, ids=[1, 2])
    assert "mlp.gate_proj (draft layers [0])" in report.split("not copied")[0]
    assert "the target has none: mlp.gate_proj (draft layers [1])" in report
    assert "self_attn.q_norm, self_attn.k_norm, post_attention_layernorm" in report


def test_the_text_model_inside_another(pool, tiny_run, tmp_path):
    path = make_multimodal(tmp_path / "target", "qwen3_vl")
    (found,) = pool.run(untrained, world=1, tp=1, config=warm_config(tiny_run, path))
    tensors = load_file(path / "model.safetensors")
    wanted = tensors["model.language_model.layers.3.mlp.down_proj.weight"]
    assert torch.equal(found[0]["layers.0.mlp.linear_fc2.weight"], wanted)


def test_what_does_not_fit_is_said(tiny_run, target):
    report = report_of(tiny_run, target, model={"ffn_hidden_size": 64})
    assert "[48, 32] there and [64, 32] here: mlp.gate_proj, mlp.up_proj" in report
    # Equal shapes, other heads.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    report = report_of(tiny_run, target, model=heads)
    assert "other heads than the draft's: self_attn.q_proj, self_attn.k_proj" in report


def test_nothing_to_copy(tiny_run, target):
    model = {"ffn_hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(ConfigError, match="(?s)no matrix of these layers fits.*other heads"):
        report_of(tiny_run, target, model=model)


def quantized(folder: Path) -> Path:
    path = make_target(folder)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def with_gelu(folder: Path) -> Path:
    path = make_target(folder)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    return path


DRAFT = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8, ffn_hidden_size=48)
REFUSED = [
    (make_target, {"ids": [1]}, r"\[1\] has 1 layers and the draft 2"),
    (make_target, {"ids": [0, 4]}, r"must lie in \[0, 3\]"),
    (with_gelu, {}, "activation 'gelu', and the draft's has 'silu'"),
    (quantized, {}, r"quantized \(fp8\)"),
    (lambda folder: make_family(folder, "deepseek_v3"), {"model": DRAFT}, "'deepseek_v3' are not"),
    (lambda folder: make_multimodal(folder, "gemma3"), {}, "'gemma3_text' are not"),
]


@pytest.mark.parametrize("make, sections, message", REFUSED)
def test_a_dry_run_refuses_what_the_run_would(tiny_run, tmp_path, make, sections, message):
    config = warm_config(tiny_run, make(tmp_path / "target"), **sections)
    with pytest.raises(ConfigError, match=message):
        describe_run(config, world_size=1)


def test_two_starts(tiny_run, target):
    with pytest.raises(ConfigError, match="name two starts"):
        warm_config(tiny_run, target, train={"initial_checkpoint": "elsewhere"})


def test_a_folder_without_weights(tiny_run, target, tmp_path):
    shutil.copytree(target, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match="safetensors of target.path, and .*bare has none"):
        report_of(tiny_run, tmp_path / "bare")
