"""Targets that are saved quantized: as Transformers loads them here, or an error beforehand."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.planning.target.rank_model import target_bytes
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.huggingface.quantization import check_quantization
from dspark_megatron.targets.huggingface.split import TargetSplit
from support.sharded_targets import own_states
from support.target_families import make_family
from support.target_states import tapped
from support.tiny_target import make_target, tiny_config
from support.training_runs import finish, launch, write_config

BLOCK = 8
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or not find_spec("accelerate"),
    reason="Transformers dequantizes fp8 where there is no GPU, and needs accelerate for it",
)


def as_fp8(folder, endings=("proj.weight",)):
    """Save the matrices with such names in 8 bits, a scale for each block, as DeepSeek-V3 is."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(endings)]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        cut = (blocks / scales[:, None, :, None]).view(rows, columns)
        tensors[name] = cut.to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return set_method(folder, "fp8", weight_block_size=[BLOCK, BLOCK])


def set_method(folder, method, **settings):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# World size, tensor parallel, data-parallel ranks that share the target, expert parallel.
ONE_RANK = (1, 1, 1, 1)
FITS = [("qwen3", *ONE_RANK), ("qwen3", 2, 2, 1, 1), ("qwen3", 2, 1, 2, 1)]
FITS += [("qwen3_moe", *ONE_RANK), ("qwen3_moe", 4, 2, 2, 1), ("qwen3_moe", 4, 2, 2, 4)]


def make_fp8(folder, family):
    if family == "qwen3":
        return as_fp8(make_target(folder, tie=False))
    return as_fp8(make_family(folder, family))


def split_config(tiny_run, path, tp, shards, ep):
    target = {"path": str(path), "shard_across_data_parallel": shards}
    parallel = {"tensor_parallel": tp, "expert_parallel": ep}
    return tiny_config(tiny_run, target=target, parallel=parallel)


@without_gpu
@pytest.mark.parametrize("family, world, tp, shards, ep", FITS)
def test_fp8_is_dequantized(pool, tiny_run, tmp_path, family, world, tp, shards, ep):
    from transformers import AutoModel

    path = make_fp8(tmp_path / "target", family)
    check_quantization(load_target_config(path), TargetSplit(tp, world // tp, shards, ep))
    model = AutoModel.from_pretrained(path)
    config = split_config(tiny_run, path, tp, shards, ep)
    for ids, taps, last_hidden, _, _ in pool.run(
        own_states, world=world, tp=tp, config=config, with_last_hidden=True
    ):
        with torch.no_grad():
            own = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(taps, torch.cat([own[1], own[3]], -1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last_hidden, own[-1], rtol=1e-4, atol=1e-5)


@without_gpu
@pytest.mark.parametrize("tp, shards", [(4, 1), (1, 4), (2, 2)])
def test_a_cut_through_a_block(tmp_path, tp, shards):
    """48 / 4 is no multiple of 8. At (2, 2) Transformers would load wrong weights silently."""
    config = load_target_config(make_fp8(tmp_path / "target", "qwen3"))
    with pytest.raises(ConfigError, match=r"blocks of 8\).*48 / 4 is no multiple of 8"):
        check_quantization(config, TargetSplit(tp, shards, shards))


@pytest.mark.slow
def test_training_says_what_is_missing(tiny_run, tmp_path):
    target = set_method(make_target(tmp_path / "target"), "fbgemm_fp8")
    sections = {"target": {"path": str(target)}, "train": {"output_dir": str(tmp_path / "run")}}
    code, output = finish(launch(write_config(tmp_path, tiny_run, **sections), 2))
    assert code != 0 and "fbgemm" in output and "save the target dequantized" in output


@pytest.mark.parametrize("method", ["compressed-tensors", "fbgemm_fp8", "gptq", "no_such_method"])
def test_what_this_machine_cannot_run(tmp_path, method):
    config = load_target_config(make_target(tmp_path / "target"))
    config.quantization_config = {"quant_method": method, "bits": 4, "group_size": 32}
    with pytest.raises(ConfigError, match=rf"quantized \({method}\).*cannot run it.*dequantized"):
        check_quantization(config, TargetSplit())


def test_a_quantized_embedding_is_refused(pool, tiny_run, tmp_path):
    path = make_fp8(tmp_path / "target", "qwen3")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config(tiny_run, target={"path": str(path)})
    with pytest.raises(AssertionError, match="lm_head.weight in .* is quantized"):
        pool.run(tapped, world=1, tp=1, config=config)


def test_the_dry_run_counts_fp8_as_it_is_saved(tiny_run, tmp_path):
    path = as_fp8(make_family(tmp_path / "target", "qwen3_moe", hidden_size=64))
    config = load_target_config(path)
    folder = SafetensorsFolder(path)
    saved = sum(
        torch.Size(shape).numel() * folder.dtypes[name].itemsize
        for name, shape in folder.shapes.items()
        if name != "lm_head.weight"
    )
    assert target_bytes(config, torch.float32, TargetSplit()) == saved
    text = describe_run(tiny_config(tiny_run, target={"path": str(path)}), 1)
    assert "the target is quantized (fp8), and counted as it is saved" in text
    text = describe_run(
        tiny_config(tiny_run, target={"path": str(set_method(path, "compressed-tensors"))}), 1
    )
    assert "(compressed-tensors), and not counted" in text and "frozen target" not in text
