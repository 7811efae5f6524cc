"""A checkpoint of any layout exports the same bytes and logits, and Megatron-Core reads it."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT
from support.tiny_target import make_target, tiny_config


def resave(runtime, config, checkpoints):
    """Load the newest checkpoint of the config's run at this layout and save it elsewhere."""
    from dspark_megatron.mcore.optimizer import build_optimizer, wrap_data_parallel
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from dspark_megatron.run.checkpoints.saving import save_checkpoint
    from dspark_megatron.storage.checkpoints.whole import iteration_folder
    from dspark_megatron.storage.training_checkpoint import read_meta

    plan = check(config, runtime.world_size)
    draft = build_draft(plan, runtime)
    optimizer = build_optimizer(
        config.optimizer, wrap_data_parallel(draft, config.optimizer), plan.dtype
    )
    folder = iteration_folder(Path(config.train.output_dir, "checkpoints"), 20)
    state = load_checkpoint(folder, draft, optimizer)
    save_checkpoint(checkpoints, state, read_meta(folder), draft, optimizer, keep_last=3)


@pytest.mark.parametrize("world, tp", [(2, 2), (4, 4), (2, 1)])
def test_a_checkpoint_of_any_layout_exports_the_same_bytes(
    pool, tiny_run, unbroken, tmp_path, world, tp
):
    from dspark_megatron.conversion.export import export_checkpoint

    config = tiny_config(
        tiny_run, train={"output_dir": str(unbroken)}, parallel={"tensor_parallel": tp}
    )
    pool.run(resave, world=world, tp=tp, config=config, checkpoints=tmp_path / "checkpoints")
    exports = [
        export_checkpoint(run, config.target.path, tmp_path / f"export_{i}")
        for i, run in enumerate((unbroken, tmp_path))
    ]
    for file in ("model.safetensors", "config.json"):
        assert (exports[0] / file).read_bytes() == (exports[1] / file).read_bytes(), file


def test_only_the_newest_checkpoints_are_kept(unbroken):
    names = sorted(p.name for p in (unbroken / "checkpoints").iterdir())
    assert names == [
        "iter_0000010",
        "iter_0000015",
        "iter_0000020",
        "latest_checkpointed_iteration.txt",
    ]


def save_untrained(runtime, config):
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints.saving import save_checkpoint
    from dspark_megatron.run.checkpoints.state import RunState
    from dspark_megatron.run.identity import export_settings, run_identity

    plan = check(config, runtime.world_size)
    draft = build_draft(plan, runtime)
    meta = {"format": 1, **run_identity(plan), **export_settings(plan)}
    checkpoints = Path(config.train.output_dir, "checkpoints")
    save_checkpoint(checkpoints, RunState(0, 0), meta, draft, optimizer=None, keep_last=1)


def test_tp_3_exports_the_bytes_of_tp_1(pool, tiny_run, tmp_path):
    """Nine query and three key/value heads, as in SmolLM2."""
    from dspark_megatron.conversion.export import export_checkpoint

    target = make_target(tmp_path / "target", hidden_size=36, heads=9, kv_heads=3)
    exports = []
    for tp in (1, 3):
        run = tmp_path / f"tp{tp}"
        config = tiny_config(
            tiny_run,
            target={"path": str(target)},
            train={"output_dir": str(run)},
            parallel={"tensor_parallel": tp},
        )
        pool.run(save_untrained, world=tp, tp=tp, config=config)
        exports.append(export_checkpoint(run, target, tmp_path / f"export{tp}"))
    for file in ("model.safetensors", "config.json"):
        assert (exports[0] / file).read_bytes() == (exports[1] / file).read_bytes(), file


def listing_command():
    """The first of docs/checkpoints.md that lists tensors."""
    lines = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if "load_tensors_metadata as load" in line)
    return shlex.split(line)[1:]


def test_megatron_lists_a_checkpoint(unbroken, tmp_path):
    """In a process that knows nothing of this package."""
    from dspark_megatron.conversion.layouts.names import megatron_shapes
    from dspark_megatron.storage.training_checkpoint import CheckpointReader

    folder = unbroken / "checkpoints" / "iter_0000020"
    command = [sys.executable, *listing_command()[:-1], str(folder)]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=900)
    assert not done.returncode, done.stderr
    listed = {}
    for line in done.stdout.splitlines():
        name, rest = line.split(" ", 1)
        listed[name] = rest
    draft = {name: rest for name, rest in listed.items() if not name.startswith("optimizer.")}
    shapes = megatron_shapes(CheckpointReader(folder).shape)
    assert draft == {name: f"{shape} torch.float32" for name, shape in shapes.items()}
    states = ("optimizer.state.exp_avg", "optimizer.state.exp_avg_sq")
    assert set(listed) - set(draft) >= {f"{state}.{name}" for state in states for name in shapes}


def test_megatron_reads_what_is_no_tensor(unbroken):
    from megatron.core import dist_checkpointing

    folder = str(unbroken / "checkpoints" / "iter_0000020")
    assert dist_checkpointing.check_is_distributed_checkpoint(folder)
    assert "optimizer" in dist_checkpointing.load_common_state_dict(folder)
    metadata = dist_checkpointing.load_content_metadata(folder)
    assert metadata["distrib_optim_sharding_type"] == "fully_reshardable"


def test_megatron_finds_the_newest_checkpoint(unbroken):
    found = pytest.importorskip("megatron.training.checkpointing", reason="0.19's wheel has it")
    checkpoints = str(unbroken / "checkpoints")
    tracker = found.get_checkpoint_tracker_filename(checkpoints)
    assert found.read_metadata(tracker) == (20, False)
    folder = found.get_checkpoint_name(checkpoints, 20, return_base_dir=True)
    assert found._get_checkpoint_format(folder, None) == "torch_dist"


def megatron_logits(runtime, config):
    """Whole draft logits and confidence of the run's last checkpoint on a fixed sample."""
    import torch

    from dspark_megatron.ops.vocab_parallel import gather_vocab
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from dspark_megatron.storage.training_checkpoint import find_checkpoint
    from support.tiny_draft import make_samples, sample_logits

    plan = check(config, runtime.world_size)
    draft = build_draft(plan, runtime)
    load_checkpoint(find_checkpoint(config.train.output_dir), draft, optimizer=None)
    samples = make_samples(plan.shape, lengths=(20,))
    ids, anchors = samples.input_ids[0], torch.tensor([2, 7, 16])
    _, logits, confidence = sample_logits(draft, samples.taps[0], ids, anchors)
    logits = gather_vocab(logits, plan.shape.vocab_size, tp_group=runtime.tp_group)
    return plan.shape, samples.taps[0], ids, anchors, logits, confidence


def test_the_export_gives_the_same_logits(pool, tiny_run, unbroken, tmp_path):
    import torch
    from safetensors.torch import load_file

    from dspark_megatron.conversion.export import export_checkpoint
    from dspark_megatron.conversion.folder_writer import WriteOptions
    from support.reference import PlainDraft

    config = tiny_config(
        tiny_run, train={"output_dir": str(unbroken)}, parallel={"tensor_parallel": 2}
    )
    shape, taps, ids, anchors, logits, confidence = pool.run(
        megatron_logits, world=2, tp=2, config=config
    )[0]
    options = WriteOptions(dtype=torch.float32)
    export = export_checkpoint(unbroken, config.target.path, tmp_path / "export", options)
    plain = PlainDraft(shape)
    plain.load_state_dict(load_file(export / "model.safetensors"), strict=True)
    with torch.no_grad():
        own = plain(taps, ids, anchors)
    torch.testing.assert_close(logits, own.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(confidence, own.confidence_logits, rtol=1e-4, atol=1e-4)
