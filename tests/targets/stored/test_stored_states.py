"""Stored states of a target: the online curve at any layout, after kills, and no other's."""

import json
import os
import shutil
import struct
from unittest import mock

import pytest
import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.data.batch import Batch, padded
from dspark_megatron.errors import ConfigError
from dspark_megatron.targets.stored.safetensors_layout import (
    context_size,
    from_float8,
    target_positions,
    to_float8,
)
from support.stored_states import prepare, prepare_options
from support.tiny_target import make_chats, tiny_config
from support.tool_runs import run_tool
from support.training_runs import assert_same_curve, curve, run_training

STEPS = 6
ALONE = {"samples_per_pass": 1}
"""Sums in one order, however the states come."""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A config of a few steps, by the output's name."""
    folder = tmp_path_factory.mktemp("cached")

    def config(name, **sections):
        train = {"output_dir": str(folder / name), "iterations": STEPS, "save_every": 100}
        sections = {**sections, "train": {**train, **sections.get("train", {})}}
        return tiny_config(tiny_run, **sections)

    config.folder = folder
    return config


@pytest.fixture(scope="module")
def online(pool, run):
    pool.run(run_training, world=1, tp=1, config=run("online", target=ALONE))
    return curve(run.folder / "online")


@pytest.fixture(scope="module")
def caches(pool, run):
    """Folders of caches by type, written by one rank."""
    for dtype in ("float32", "bfloat16", "float8"):
        output = run.folder / f"cache_{dtype}"
        pool.run(prepare_options, world=1, tp=1, config=run("x"), output=output, dtype=dtype)
    return {dtype: run.folder / f"cache_{dtype}" for dtype in ("float32", "bfloat16", "float8")}


def cached(run, name, cache, **sections):
    target = {"provider": "cache", "cache": str(cache), **sections.pop("target", {})}
    return run(name, target=target, **sections)


# Written by so many ranks at this tensor-parallel size, with shared weights or not; read by.
LAYOUTS = [((4, 2, 1), (2, 1)), ((2, 1, 2), (2, 2))]


@pytest.mark.parametrize("written, read", LAYOUTS)
def test_stored_states_give_the_online_curve(pool, run, online, tmp_path, written, read):
    world, tp, shared = written
    target = {"shard_across_data_parallel": shared}
    config = run("x", target=target, parallel={"tensor_parallel": tp})
    output = tmp_path / "cache"
    pool.run(prepare_options, world=world, tp=tp, config=config, output=output, dtype="float32")
    assert len(list(output.glob("shard_*"))) % 2 == 1, "ranks should have unequal work"
    world, tp = read
    settings = {"output_dir": str(tmp_path / "run"), "micro_batch_size": 2}
    # How the target was shared is of no matter, and need not suit these ranks.
    sections = dict(target=target, train=settings, parallel={"tensor_parallel": tp})
    config = cached(run, "", output, **sections)
    pool.run(run_training, world=world, tp=tp, config=config)
    assert_same_curve(curve(tmp_path / "run"), online)


def run_without_target(runtime, config):
    from dspark_megatron.run import states as states_source

    with mock.patch.object(
        states_source, "build_target", side_effect=AssertionError("a target is loaded")
    ):
        run_training(runtime, config)


@pytest.mark.parametrize("dtype, rel", [("float32", 0), ("bfloat16", 0.02), ("float8", 0.1)])
def test_rounding_of_the_states_moves_the_curve_little(pool, run, online, caches, dtype, rel):
    config = cached(run, f"run_{dtype}", caches[dtype])
    pool.run(run_without_target, world=1, tp=1, config=config)
    for mine, theirs in zip(curve(config.train.output_dir), online, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=rel)
        assert mine["tau"] == pytest.approx(theirs["tau"], rel=rel)


RULES = [
    LossConfig(anchor_rule=anchor, supervised_slots=slots, slot_mask=mask)
    for anchor in ("label", "token")
    for slots in ("prefix", "all")
    for mask in ("label", "input")
]


def rules_of(loss):
    return f"{loss.anchor_rule}-{loss.supervised_slots}-{loss.slot_mask}"


def needed(mask, block_size, rules):
    """Positions that any anchor reads: (context, targets), slot by slot."""
    seen, targets, s = {0}, set(), len(mask)
    for anchor in range(s - 1):
        if not mask[anchor] or (rules.anchor_rule == "label" and not mask[anchor + 1]):
            continue
        seen.update(range(anchor))
        for k in range(block_size):
            label = anchor + k + 1
            inside = label < s
            good = inside and bool(mask[label if rules.slot_mask == "label" else label - 1])
            if good:
                targets.add(anchor + k)
            elif rules.supervised_slots == "prefix":
                break
    return seen, targets


@pytest.mark.parametrize("rules", RULES, ids=rules_of)
def test_what_is_kept_is_what_some_anchor_reads(rules):
    generator = torch.Generator().manual_seed(0)
    for length in (2, 9, 30):
        mask = torch.rand(length, generator=generator) > 0.4
        seen, targets = needed(mask.tolist(), 4, rules)
        assert set(range(context_size(mask, rules))) == seen
        assert set(target_positions(mask, 4, rules).tolist()) == targets


def test_float8_rounds_each_row_of_each_layer_by_itself():
    taps = torch.randn(5, 3 * 16) * torch.tensor([1e-3, 1.0, 1e4]).repeat_interleave(16)
    taps[2] = 0
    found = from_float8(*to_float8(taps, 3)).float()
    largest = taps.unflatten(1, (3, -1)).abs().amax(dim=-1).repeat_interleave(16, dim=1)
    # 3 bits of a mantissa: 2^-4 of a number; below 2^-6 of 448 steps of 2^-9. bf16: 2^-9.
    bound = taps.abs() * (2**-4 + 2**-8) + largest / 448 * 2**-10
    assert ((found - taps).abs() <= bound).all()


@pytest.mark.parametrize("world, stop_after", [(1, 0), (1, 2), (2, 0)])
def test_a_stopped_job_goes_on_to_the_same_bytes(pool, run, caches, tmp_path, world, stop_after):
    """On one rank, whichever number began it."""
    output, place = tmp_path / "cache", dict(world=1, tp=1, config=run("x"))
    stop = dict(stop_after=stop_after, dtype="bfloat16")
    pool.run(prepare_options, **{**place, "world": world}, output=output, **stop)
    assert len(list(output.glob("shard_*"))) == stop_after
    reading = cached(run, "never", output)
    with pytest.raises(AssertionError, match="are not finished; the command that began them"):
        pool.run(run_training, world=1, tp=1, config=reading)
    pool.run(prepare_options, **place, output=output, dtype="bfloat16")
    assert contents(output) == contents(caches["bfloat16"])


def test_the_first_and_last_moments_of_a_job(pool, run, caches, tmp_path):
    """Killed before the manifest had its first name, and before it had its last; and a shard that
    was lost afterwards."""
    whole, output = contents(caches["bfloat16"]), tmp_path / "cache"
    place = dict(world=1, tp=1, config=run("x"), output=output, dtype="bfloat16")
    output.mkdir()
    (output / ".partial_unfinished_manifest.json").write_text("{")
    pool.run(prepare_options, **place)
    assert contents(output) == whole
    (output / "manifest.json").rename(output / "unfinished_manifest.json")
    pool.run(prepare_options, **place)
    assert contents(output) == whole
    (output / "shard_00001.safetensors").unlink()
    with pytest.raises(AssertionError, match="shard_00001.safetensors is damaged .it is not there"):
        pool.run(run_training, world=1, tp=1, config=cached(run, "never", output))
    pool.run(prepare_options, **place)
    assert contents(output) == whole
    (output / "index.safetensors").unlink()
    shard = output / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    pool.run(prepare_options, **place)
    assert contents(output) == whole


def test_killed_at_random_points(pool, run, tmp_path):
    config = run("x", data={"train_files": [str(make_chats(tmp_path / "chats.jsonl", 300))]})
    file, killed, whole = tmp_path / "run.yaml", tmp_path / "killed", tmp_path / "whole"
    file.write_text(config.to_yaml(), encoding="utf-8")
    place = dict(world=1, tp=1, config=config)
    pool.run(prepare_options, **place, output=whole, **{"shard-mib": "0.001"})
    options = ["--config", str(file), "--output", str(killed), "--shard-mib", "0.001"]
    text = run_tool("tests/support/killed_writer.py", "4", *options)
    assert text.splitlines().count("killed") == 4
    assert contents(killed) == contents(whole)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"target_layer_ids": [0, 1]}}, r"target_layer_ids: \[0, 2\] there, \[0, 1\]"),
        ({"model": {"block_size": 4}}, "block_size: 3 there, 4 here"),
        ({"target": {"dtype": "bfloat16"}}, "dtype: torch.float32 there, torch.bfloat16 here"),
        ({"loss": {"slot_mask": "input"}}, "rules.slot_mask: label there, input here"),
        ({"data": {"max_length": 40}}, "lack 20 of 24 .* max_length: 48 there, 40 here"),
    ],
)
def test_stored_states_of_another_run_are_refused(pool, run, caches, sections, message):
    config = cached(run, "refused", caches["float32"], **sections)
    with pytest.raises(AssertionError, match=message):
        pool.run(run_training, world=1, tp=1, config=config)


def states_read_ahead(runtime, config):
    """What is expected and asked for, but for one; asked for alone; and how often it was read."""
    from dspark_megatron.run.check import check
    from dspark_megatron.run.data import load_run_data
    from dspark_megatron.run.states import stored_states_of

    plan = check(config, runtime.world_size)
    data = load_run_data(plan, config.data.train_files)
    target, read = stored_states_of(plan, runtime, data), []
    assert target.is_checked(60)  # its shards are read in the background
    states = target._reader.states
    target._reader.states = lambda place: read.append(place) or states(place)
    samples = [(0, 1), (2, 3), (0, 1), (4, 5), (6, 7)]
    ids = [padded([data[i].input_ids for i in pair]) for pair in samples]
    batches = [Batch(*one) for one in zip(ids, [[1, 1]] * 5, samples, strict=True)]
    alone = [target.states(batch) for batch in batches]
    read.clear()
    target.expect(batches)
    ahead = {i: target.states(batches[i]) for i in (0, 2, 3, 4)}
    target.expect(batches[:3])  # left over by a step that was cut short
    target.expect(batches[:1])
    again = target.states(batches[0])
    kept = [
        (alone[i].taps, alone[i].last_hidden, one.taps, one.last_hidden) for i, one in ahead.items()
    ]
    return [*kept, (alone[0].taps, alone[0].last_hidden, again.taps, again.last_hidden)], read


def test_states_are_read_ahead(pool, run, caches):
    [(kept, read)] = pool.run(
        states_read_ahead, world=1, tp=1, config=cached(run, "x", caches["float32"])
    )
    for taps, last_hidden, taps_ahead, last_hidden_ahead in kept:
        torch.testing.assert_close(taps_ahead, taps, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(last_hidden_ahead, last_hidden, rtol=0, atol=0, equal_nan=True)
    assert len(read[:10]) == len(set(read[:10])) + 2, "each once, and the two that come twice"


def test_a_smaller_block_is_served(pool, run, caches):
    for name, target in (
        ("a", ALONE),
        ("b", {"provider": "cache", "cache": str(caches["float32"])}),
    ):
        config = run(f"small_{name}", model={"block_size": 2}, target=target)
        pool.run(run_training, world=1, tp=1, config=config)
    assert_same_curve(*(curve(run.folder / f"small_{name}") for name in "ab"), rel=0)


def test_another_target_and_an_unlike_job_are_refused(pool, run, caches, tmp_path):
    from support.tiny_target import make_target

    other = str(make_target(tmp_path / "other", seed=1))
    config = cached(run, "refused", caches["float32"], target={"path": other})
    with pytest.raises(AssertionError, match="target_fingerprint: .* there, .* here"):
        pool.run(run_training, world=1, tp=1, config=config)
    place = dict(world=1, tp=1, config=run("x"), dtype="float8")
    with pytest.raises(
        AssertionError, match="states of another job: dtype: float32 there, float8 here"
    ):
        pool.run(prepare_options, **place, output=caches["float32"])


def prepare_on_a_small_disk(runtime, config, output):
    usage = shutil.disk_usage("/")._replace(free=1000)
    with mock.patch("shutil.disk_usage", return_value=usage):
        prepare(runtime, config, output)


def test_nothing_is_written_that_cannot_fit(pool, run, tmp_path):
    with pytest.raises(AssertionError, match="the stored states need .* more and .* has 0.000 GiB"):
        output = tmp_path / "cache"
        pool.run(prepare_on_a_small_disk, world=1, tp=1, config=run("x"), output=output)
    assert not output.exists()


def read_deepspec(folder):
    """All samples of a cache of version 2, field by field."""
    manifest = json.loads((folder / "manifest.json").read_text())
    h, m = manifest["hidden_size"], len(manifest["target_layer_ids"])
    index = (folder / "samples.idx").read_bytes()
    assert manifest["index_record_size"] == 56 and len(index) == 56 * manifest["num_samples"]
    for record in struct.iter_unpack("<QIIQQQQQ", index):
        sample_id, shard, length, *offsets = record
        data = (folder / manifest["shards"][shard]["file_name"]).read_bytes()
        fields = zip(offsets, ("i", "B", "B", "H", "H"), (1, 1, 1, m * h, h), strict=True)
        arrays = [
            struct.unpack_from(f"<{length * width}{kind}", data, offset)
            for offset, kind, width in fields
        ]
        yield sample_id, arrays


def test_deepspec_layout_holds_every_state(pool, run, caches, tmp_path):
    """Field by field against our own layout, and the same curve from either; also when the
    manifest has only what DeepSpec writes into it."""
    output = tmp_path / "deepspec"
    place = dict(world=1, tp=1)
    pool.run(prepare_options, **place, config=run("x"), output=output, format="deepspec")
    from dspark_megatron.targets.stored.layout import read_manifest
    from dspark_megatron.targets.stored.safetensors_layout import SafetensorsStates

    ours = SafetensorsStates(caches["bfloat16"], read_manifest(caches["bfloat16"]))
    samples = list(read_deepspec(output))
    assert [i for i, _ in samples] == list(range(24))
    for i, (ids, attention, loss_mask, taps, last_hidden) in samples:
        assert set(attention) == {1} and len(attention) == len(ids)
        assert ours.key(torch.tensor(ids), torch.tensor(loss_mask).bool()) == ours.keys()[i]
        kept = ours.states(i)
        width = kept.taps.shape[1]
        bits = torch.tensor(taps, dtype=torch.int32).view(-1, width)
        assert torch.equal(bits[: len(kept.taps)], kept.taps.view(torch.uint16).int())
        bits = torch.tensor(last_hidden, dtype=torch.int32).view(len(ids), -1)
        assert torch.equal(bits[kept.positions], kept.last_hidden.view(torch.uint16).int())
    manifest = json.loads((output / "manifest.json").read_text())
    del manifest["dspark_megatron"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    (output / "checksums.json").unlink()
    for name, cache in (("ours", caches["bfloat16"]), ("deepspec", output)):
        config = cached(run, f"from_{name}", cache)
        pool.run(run_without_target, **place, config=config)
    both = (curve(run.folder / f"from_{name}") for name in ("ours", "deepspec"))
    assert_same_curve(*both, rel=0)
    shard = output / manifest["shards"][-1]["file_name"]
    os.truncate(shard, 10)
    config = cached(run, "from_damaged", output)
    with pytest.raises(AssertionError, match="ends before what samples.idx says of it"):
        pool.run(run_training, **place, config=config)
    (output / "samples.idx").unlink()
    with pytest.raises(AssertionError, match="lack samples.idx"):
        pool.run(run_training, **place, config=config)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    sizes = ["--gib", "0.02", "--rounds", "1"]
    text = run_tool("tools/benchmark_cache.py", "--folder", tmp_path, *sizes)
    assert "plain reads" in text and "states" in text
    assert not list(tmp_path.iterdir()), "the files are removed"


def test_a_dry_run_counts_no_target(run):
    from dspark_megatron.planning.dry_run import describe_run

    online, read = (describe_run(config, 2) for config in (run("x"), cached(run, "x", "nowhere")))
    assert "frozen target " in online and "the target's forward pass" in online
    assert "frozen target " not in read and "the target's forward pass" not in read


def test_what_needs_the_target_says_so(run, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match="needs target.cache"):
        run("x", target={"provider": "cache"})
    other = tmp_path / "heldout.jsonl"
    with pytest.raises(ConfigError, match="needs the target for answers whose states are not"):
        evaluate = {"every": 2, "heldout_files": [str(other)]}
        cached(run, "x", "somewhere", evaluate=evaluate)
    from dspark_megatron.evaluation.drafts import with_known_draft

    with pytest.raises(ConfigError, match="stored states have none of new tokens"):
        prompts = {"prompt_files": [str(other)]}
        with_known_draft(cached(run, "x", "somewhere", evaluate=prompts))
