"""A target from a Megatron-LM checkpoint: any layout that wrote it gives the same states."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_megatron.conversion.layouts.names import layer_table
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.check import check
from dspark_megatron.run.initial.checkpoint_layers import CheckpointLayers
from dspark_megatron.run.initial.target_layers import FolderLayers
from dspark_megatron.storage.gpt_checkpoint import GPTCheckpoint
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.storage.target_weights import shared_matrices, weights_fingerprint
from support.megatron_checkpoint import write_checkpoint
from support.megatron_targets import TARGETS, assert_states, config_of, megatron_states, whole
from support.shapes import SHAPE
from support.stored_states import prepare_options
from support.tiny_target import tiny_config
from support.tool_runs import run_tool
from support.training_runs import (
    assert_same_curve,
    curve,
    finish,
    launch,
    run_training,
    write_config,
)

READERS = [(name, 1, 1, 1) for name in TARGETS]


READERS += [("qwen3", 4, 4, 1), ("mixed", 4, 4, 1), ("experts", 4, 2, 4)]


@pytest.mark.parametrize("name, world, tp, ep", READERS)
def test_states_at_another_layout(pool, tiny_run, target, checkpoint, name, world, tp, ep):
    run, path = checkpoint(name)
    config = config_of(tiny_run, path, tp, ep, target={"checkpoint": str(run)})
    assert_states(pool.run(megatron_states, world=world, tp=tp, config=config), target(name))


BAD = {
    "layers": ({"arguments": {"num_layers": 3}}, "num_layers (3 in", "4 in config.json"),
    "rope": ({"arguments": {"rotary_base": 5000}}, "rotary_base (5000.0 in", "10000.0 in"),
    "tied": (
        {"arguments": {"untie_embeddings_and_output_weights": True}},
        "share_embeddings_and_output_weights (False in",
    ),
    "norm": ({"arguments": {"normalization": "LayerNorm"}}, "normalization (LayerNorm, must be"),
    "no RoPE": ({"arguments": {"no_rope_freq": [0, 1, 0, 1]}}, "no_rope_freq ([0, 1, 0, 1], must"),
    "norms": (
        {"arguments": {"layernorm_zero_centered_gamma": True}},
        "apply_layernorm_1p (True, must be False)",
    ),
    "missing": ({"rename": {"k_layernorm": "k_norm"}}, "lacks decoder.layers", "k_layernorm"),
    "old arguments": ({"without": "kv_channels"}, "must say kv_channels"),
    "no arguments": ({"arguments": None}, "must hold Megatron-LM's arguments"),
    "foreign code": ({"foreign": True}, "builtins.print", "nothing of it was run"),
}


@pytest.mark.parametrize("case", BAD)
def test_checkpoints_that_are_refused(pool, tiny_run, target, tmp_path, case):
    """Of the models that the config describes, no two differ in one number alone."""
    writer, *words = BAD[case]
    config = config_of(tiny_run, target("qwen3"))
    pool.run(write_checkpoint, world=1, tp=1, config=config, output=str(tmp_path), **writer)
    config = config_of(tiny_run, target("qwen3"), target={"checkpoint": str(tmp_path)})
    with pytest.raises(AssertionError) as error:
        pool.run(megatron_states, world=1, tp=1, config=config)
    for word in words:
        assert word in str(error.value)


def test_states_in_bfloat16_from_float32(pool, tiny_run, target, checkpoint):
    """Both ways of loading cast; the states lie within what 8 bits allow."""
    run, path = checkpoint("qwen2")
    for settings in ({"path": str(path), "checkpoint": str(run)}, {"path": str(target("qwen2"))}):
        config = config_of(tiny_run, path, 2, target={**settings, "dtype": "bfloat16"})
        taps, last_hidden, _ = pool.run(megatron_states, world=2, tp=2, config=config)[0]
        assert taps.dtype == last_hidden.dtype == torch.bfloat16
        torch.testing.assert_close(
            last_hidden.float(), whole(target("qwen2"))[1], atol=0.1, rtol=0.1
        )


def test_a_damaged_checkpoint(pool, tiny_run, checkpoint, tmp_path):
    run, path = checkpoint("qwen2")
    copy = shutil.copytree(run, tmp_path / "run")
    for file in copy.glob("iter_0000100/*.distcp"):
        file.write_bytes(b"")
    config = config_of(tiny_run, path, target={"checkpoint": str(copy)})
    with pytest.raises(AssertionError, match="is damaged or incomplete"):
        pool.run(megatron_states, world=1, tp=1, config=config)


def test_folders_that_are_no_checkpoint(tiny_run, target, tmp_path):
    def refused(words):
        config = config_of(tiny_run, target("qwen3"), target={"checkpoint": str(tmp_path / "run")})
        with pytest.raises(ConfigError, match=words):
            check(config, 1)

    refused("is not a folder")
    (tmp_path / "run").mkdir()
    refused("no .metadata.*ckpt-format torch_dist")
    tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    tracker.write_text("7")
    refused("iter_0000007 is not there")
    tracker.write_text("seven")
    refused("`release`, and holds 'seven'")


@pytest.mark.parametrize("vocab_size", [301, 302])
def test_rows_of_the_vocabulary(checkpoint, target, tmp_path, vocab_size):
    """The checkpoint of two ranks has 302 rows, of which one is padding, or is not."""
    run, path = checkpoint("qwen2")
    path = shutil.copytree(path, tmp_path / "target")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    embedding, head = shared_matrices(path, run)
    assert embedding.name == head.name and embedding.shape == (vocab_size, 32)
    expected = load_file(target("qwen2") / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding.tensor()[:301], expected)
    assert torch.equal(head.rows(298, 301), expected[298:])
    assert not embedding.rows(301, 310).any()


def test_fingerprints_do_not_depend_on_the_layout(pool, tiny_run, target, checkpoint, tmp_path):
    run, path = checkpoint("qwen3")
    config = config_of(tiny_run, target("qwen3"))
    pool.run(write_checkpoint, world=1, tp=1, config=config, output=str(tmp_path / "same"))
    whole = weights_fingerprint(path, tmp_path / "same")
    assert whole == weights_fingerprint(path, run)
    other = shutil.copytree(target("qwen3"), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 5] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = config_of(tiny_run, other)
    pool.run(write_checkpoint, world=1, tp=1, config=config, output=str(tmp_path / "tuned"))
    assert whole != weights_fingerprint(path, tmp_path / "tuned")


def test_another_upper_layer_is_another_target(pool, tiny_run, target, checkpoint, tmp_path):
    run, path = checkpoint("qwen3")
    other = shutil.copytree(target("qwen3"), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 5] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = config_of(tiny_run, other)
    pool.run(write_checkpoint, world=1, tp=1, config=config, output=str(tmp_path / "tuned"))
    assert weights_fingerprint(path, run) != weights_fingerprint(path, tmp_path / "tuned")


def test_newer_names_of_arguments(pool, tiny_run, target, tmp_path):
    config = config_of(tiny_run, target("qwen3"))
    names = {"arguments": {"layernorm_epsilon": 1e-6}, "without": "norm_epsilon"}
    pool.run(write_checkpoint, world=1, tp=1, config=config, output=str(tmp_path), **names)
    config = config_of(tiny_run, target("qwen3"), target={"checkpoint": str(tmp_path)})
    check(config, 1)


def test_names_of_transformer_engine(pool, tiny_run, target, tmp_path):
    """Its layers of experts keep the norm apart, and Megatron-Core's local ones say otherwise."""
    path, config = target("experts"), config_of(tiny_run, target("experts"))
    rename = {"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}
    pool.run(write_checkpoint, world=1, tp=1, config=config, output=str(tmp_path), rename=rename)
    config = config_of(tiny_run, path, 1, target={"checkpoint": str(tmp_path)})
    assert_states(pool.run(megatron_states, world=1, tp=1, config=config), path)


@pytest.mark.commands
def test_train_evaluate_and_export_from_a_checkpoint(tiny_run, target, checkpoint, tmp_path):
    """Nothing but a config and a tokenizer beside it."""
    run, path = checkpoint("qwen2")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n{"prompt": "the hill"}\n')
    config = write_config(
        tmp_path,
        tiny_run,
        target={"path": str(path), "provider": "megatron", "checkpoint": str(run)},
        train={"output_dir": str(tmp_path / "draft"), "iterations": 3},
        parallel={"tensor_parallel": 2},
        evaluate={"prompt_files": [str(prompts)], "max_new_tokens": 8, "batch_size": 2},
    )
    for module in ("train", "evaluate"):
        code, text = finish(launch(config, 2, module=module))
        assert code == 0, text
    assert json.loads((tmp_path / "draft" / "evaluation.json").read_text())["iteration"] == 3
    out = tmp_path / "out"
    command = ["tools/convert_checkpoint.py", "export", "--checkpoint", tmp_path / "draft"]
    command += ["--target", path, "--output", out, "--dtype", "fp32", "--target-checkpoint", run]
    assert "equal to the target's" in run_tool(*command)
    expected = load_file(target("qwen2") / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load_file(out / "model.safetensors")["embed_tokens.weight"], expected)


def test_its_states_stored(pool, tiny_run, checkpoint, tmp_path):
    run, path = checkpoint("qwen2")
    target, cache = (
        {"path": str(path), "provider": "megatron", "checkpoint": str(run)},
        tmp_path / "c",
    )

    def config(name, **changes):
        train = {"output_dir": str(tmp_path / name), "iterations": 3}
        return tiny_config(tiny_run, target={**target, **changes}, train=train)

    place = dict(world=1, tp=1)
    pool.run(prepare_options, **place, config=config("x"), output=cache, dtype="float32")
    pool.run(run_training, **place, config=config("online"))
    pool.run(run_training, **place, config=config("cached", provider="cache", cache=str(cache)))
    assert_same_curve(curve(tmp_path / "cached"), curve(tmp_path / "online"))


@pytest.mark.parametrize("name", TARGETS)
def test_layers_for_a_draft_are_those_of_the_folder(checkpoint, target, name):
    run, _ = checkpoint(name)
    text = load_target_config(target(name)).get_text_config()
    theirs, ours = FolderLayers(target(name)), CheckpointLayers(GPTCheckpoint(run), text)
    biases = [f"layers.{{}}.self_attn.{letter}_proj.bias" for letter in "qkv"]
    compared = 0
    for layer in range(text.num_hidden_layers):
        rows = [
            (row.split, one)
            for row in layer_table(SHAPE)
            for one in row.of_layer(layer).hugging_face
        ]
        for split, tensor in [*rows, *((0, bias.format(layer)) for bias in biases)]:
            assert ours.shape(tensor) == theirs.shape(tensor), tensor
            if theirs.shape(tensor) is None:
                continue
            places = [(0, 1)] if split is None else [(0, 1), (0, 2), (1, 2)]
            for place in places:
                found, wanted = (one.part(tensor, split, *place) for one in (ours, theirs))
                assert torch.equal(found, wanted), (tensor, place)
                compared += 1
    assert compared > 10 * text.num_hidden_layers


def warm_draft(runtime, config):
    from dspark_megatron.training.loop import build_run_draft

    draft = build_run_draft(check(config, runtime.world_size), runtime, is_new=True)
    return {n: p.detach() for n, p in draft.named_parameters() if p.requires_grad}


def test_a_draft_starts_from_layers_of_the_checkpoint(pool, tiny_run, checkpoint, target):
    run, folder = checkpoint("qwen3")
    model, drafts = {"initialize_from_target_layers": [3, 1]}, []
    for path, there in ((target("qwen3"), ""), (folder, str(run))):
        one = {"path": str(path), "provider": "megatron", "checkpoint": there}
        sections = {"target": one, "model": model, "parallel": {"tensor_parallel": 2}}
        drafts.append(pool.run(warm_draft, world=2, tp=2, config=tiny_config(tiny_run, **sections)))
    for rank, wanted in zip(*drafts, strict=True):
        assert [name for name in wanted if not torch.equal(rank[name], wanted[name])] == []
