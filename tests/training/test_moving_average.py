"""The moving average of a run's weights: that of one process, kept, continued, exported, judged."""

import contextlib
import json
import shutil
from pathlib import Path
from unittest import mock

import convert_checkpoint
import pytest
import torch

from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint
from support.bad_samples import run_poisoned
from support.tiny_target import make_chats, tiny_config
from support.training_runs import assert_same_curve, curve, run_training

DECAY = 0.7
BAD = (5, 17)
GIVEN = ["target.path=there", "model.target_layer_ids=[1]", "model.mask_token_id=3"]


def averaged(tiny_run, output, *, tp=1, optimizer=None, **train):
    settings = {"output_dir": str(output), "iterations": 4, "save_every": 2, **train}
    return tiny_config(
        tiny_run,
        train=settings,
        parallel={"tensor_parallel": tp},
        optimizer={"ema_decay": DECAY, **(optimizer or {})},
    )


def trained(draft):
    return {n: p.detach().clone().float() for n, p in draft.named_parameters() if p.requires_grad}


class Twin:
    """The average of this rank's part of the weights, one step after the other."""

    def __init__(self):
        self.values, self.trainer = None, None

    @contextlib.contextmanager
    def watching(self):
        from dspark_megatron.training import loop

        step = loop.Trainer._train_step

        def watched(trainer, metrics):
            self.trainer = trainer
            self.values = self.values or trained(trainer.draft)
            norm = step(trainer, metrics)
            if norm is not None:
                for name, weight in trained(trainer.draft).items():
                    self.values[name] = DECAY * self.values[name] + (1 - DECAY) * weight
            return norm

        with mock.patch.object(loop.Trainer, "_train_step", watched):
            yield

    def distance(self, others):
        """The largest, in parts of a weight or, where they are small, of 1."""
        others = dict(others)
        assert others.keys() == self.values.keys()
        return max(
            float(((value - others[name]).abs() / value.abs().clamp_min(1)).max())
            for name, value in self.values.items()
        )


def followed(runtime, config, run=run_training, **options):
    """How far a run's average is from the twin's; whether a draft gets it from the checkpoint bit
    by bit; how far the weights are from it; and its bytes on this rank."""
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.checkpoints.loading import load_checkpoint

    twin = Twin()
    with twin.watching():
        run(runtime, config, **options)
    trainer = twin.trainer
    read = build_draft(trainer.plan, runtime)
    load_checkpoint(find_checkpoint(config.train.output_dir), read, None, weights="ema")
    average = dict(trainer.average.parts())
    expected = {name: part.to(trainer.plan.dtype).float() for name, part in average.items()}
    return (
        twin.distance(average),
        same_bits(trained(read), expected),
        twin.distance(trained(trainer.draft)),
        sum(x.nbytes for values in trainer.average._values for x in values),
    )


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def assert_followed(found, bound=1e-6):
    for to_twin, is_read, to_weights, _ in found:
        assert to_twin < bound < 0.2 * to_weights
        assert is_read


FAST = {"lr": 0.1}  # so that the average is further from the weights than rounding to bf16
PLAIN, MUON = {"use_distributed_optimizer": False}, {"name": "muon"}
LAYOUTS = [
    (1, 1, {}, "float32"),
    (2, 2, {}, "float32"),
    (2, 1, {}, "float32"),
    (2, 1, PLAIN, "float32"),
    (4, 2, FAST, "bfloat16"),
    (2, 2, FAST | PLAIN, "bfloat16"),
    (4, 2, MUON, "float32"),
    (2, 1, MUON | PLAIN, "float32"),
]


@pytest.mark.parametrize("world, tp, optimizer, dtype", LAYOUTS)
def test_the_average_is_that_of_one_process(pool, tiny_run, tmp_path, world, tp, optimizer, dtype):
    """With bf16 the twin sees rounded weights: 2^-9 of each at most. The plan has the bytes of the
    first rank, but for padding of buckets."""
    from dspark_megatron.planning.memory import rank_memory
    from dspark_megatron.run.check import check

    config = averaged(tiny_run, tmp_path, tp=tp, optimizer=optimizer, dtype=dtype)
    bound = 1e-6 if dtype == "float32" else 2**-8
    found = pool.run(followed, world=world, tp=tp, config=config)
    assert_followed(found, bound)
    planned = rank_memory(check(config, world)).held["moving average (fp32)"]
    assert found[0][-1] == pytest.approx(planned, rel=0.02)


def test_a_run_without_an_average_plans_and_saves_none(unbroken, tiny_run):
    from dspark_megatron.planning.memory import rank_memory
    from dspark_megatron.run.check import check

    assert "moving average (fp32)" not in rank_memory(check(tiny_config(tiny_run), 1)).held
    meta = json.loads((find_checkpoint(unbroken) / "dspark.json").read_text())
    assert "ema_decay" not in meta


@pytest.mark.parametrize("world, distributed", [(1, True), (2, False)])
def test_a_skipped_step_leaves_the_average(pool, tiny_run, tmp_path, world, distributed):
    optimizer = {"use_distributed_optimizer": distributed}
    config = averaged(tiny_run, tmp_path, optimizer=optimizer, iterations=6)
    options = dict(run=run_poisoned, samples=BAD)
    found = pool.run(followed, world=world, tp=1, config=config, **options)
    assert [row["loss"] for row in curve(tmp_path)].count(None) in (1, 2)
    assert_followed(found)


@pytest.fixture(scope="module")
def whole_run(pool, tiny_run, tmp_path_factory):
    """The output of four steps on two data-parallel ranks, saved after two."""
    output = tmp_path_factory.mktemp("averaged")
    pool.run(run_training, world=2, tp=1, config=averaged(tiny_run, output))
    return output


def tensors(run, weights="ema", iteration=None):
    reader = CheckpointReader(find_checkpoint(run, iteration), weights)
    return {name: reader.tensor(name) for name in reader.names()}


def test_a_run_that_goes_on_has_the_same_curve_and_average(pool, tiny_run, whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    config = averaged(tiny_run, run, resume_from=2, async_save=True)
    pool.run(run_training, world=2, tp=1, config=config)
    assert_same_curve(curve(run), curve(whole_run), rel=0)
    for weights in ("ema", "trained"):
        assert same_bits(tensors(run, weights), tensors(whole_run, weights))
    assert not same_bits(tensors(run), tensors(run, "trained"))


def without_padding(run):
    """The average of each tensor of an export: the vocabulary is padded as the layout needs it."""
    from dspark_megatron.conversion.sources import CheckpointSource

    return dict(CheckpointSource(run, weights="ema").tensors())


def resaved(runtime, config, output):
    """The newest checkpoint, loaded at this layout and saved elsewhere."""
    from dspark_megatron.mcore.averages.moving_average import MovingAverage
    from dspark_megatron.mcore.optimizer import build_optimizer, wrap_data_parallel
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from dspark_megatron.run.checkpoints.saving import save_checkpoint
    from dspark_megatron.storage.training_checkpoint import read_meta

    plan = check(config, runtime.world_size)
    draft = build_draft(plan, runtime)
    model = wrap_data_parallel(draft, config.optimizer)
    optimizer = build_optimizer(config.optimizer, model, plan.dtype)
    average = MovingAverage.of(config.optimizer, optimizer, draft)
    folder = find_checkpoint(config.train.output_dir)
    state = load_checkpoint(folder, draft, optimizer, average)
    checkpoints = Path(output, "checkpoints")
    save_checkpoint(checkpoints, state, read_meta(folder), draft, optimizer, average, keep_last=1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_average_goes_from_layout_to_layout_bit_by_bit(
    pool, tiny_run, whole_run, tmp_path, name
):
    run = whole_run
    if name == "muon":
        run = tmp_path / "run"
        config = averaged(tiny_run, run, tp=2, optimizer=MUON, iterations=2)
        pool.run(run_training, world=4, tp=2, config=config)
    before = without_padding(run)
    for world, tp, distributed in [(4, 2, True), (4, 4, True), (2, 1, False)]:
        output = tmp_path / f"{world}_{tp}"
        optimizer = {"name": name, "use_distributed_optimizer": distributed or name == "adamw"}
        config = averaged(tiny_run, run, tp=tp, optimizer=optimizer)
        pool.run(resaved, world=world, tp=tp, config=config, output=output)
        run = output
        assert same_bits(without_padding(run), before)


def test_an_average_that_begins_in_a_run_starts_at_its_weights(pool, tiny_run, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    config = averaged(tiny_run, run, iterations=22)
    assert_followed(pool.run(followed, world=2, tp=1, config=config))


def test_what_changes_about_the_average_is_said(whole_run, unbroken):
    from dspark_megatron.training.resuming import average_text

    with_one, without = find_checkpoint(whole_run), find_checkpoint(unbroken)
    assert average_text(with_one, DECAY) == average_text(without, None) == ""
    assert "iter_0000020 has no moving average" in average_text(without, DECAY)
    assert "of iter_0000004 is dropped: optimizer.ema_decay is null" in average_text(with_one, None)
    assert "goes on with optimizer.ema_decay 0.9; it was 0.7" in average_text(with_one, 0.9)


def convert(*arguments):
    return convert_checkpoint.main([*map(str, arguments)])


WHOLE = ("--dtype", "same", "--skip-logits")


def test_an_export_of_the_average(tiny_run, whole_run, tmp_path, capsys):
    from dspark_megatron.storage.safetensors_folder import SafetensorsFolder

    out, target = tmp_path / "export", tiny_run["target"]["path"]
    of_run = ["--checkpoint", whole_run, "--target", target]
    assert convert("export", *of_run, "--output", out, "--weights", "ema", *WHOLE) == 0
    expected = without_padding(whole_run)
    folder = SafetensorsFolder(out)
    assert same_bits({name: folder.tensor(name) for name in expected}, expected)
    assert f"a decay of {DECAY}" in (out / "README.md").read_text()
    assert convert("verify", "--input", out, *of_run, "--weights", "ema", "--skip-logits") == 0
    assert "equals the moving average in the checkpoint" in capsys.readouterr().out
    assert convert("verify", "--input", out, *of_run, "--skip-logits") == 1
    assert "fc.weight" in capsys.readouterr().out


def test_an_average_that_is_not_there_is_not_exported(tiny_run, unbroken, tmp_path, capsys):
    command = ["export", "--checkpoint", unbroken, "--target", tiny_run["target"]["path"]]
    assert convert(*command, "--output", tmp_path / "out", "--weights", "ema") == 2
    assert "has no moving average of the weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def estimate_of_the_checkpoint(runtime, config):
    """Held-out tau of the average in the newest checkpoint, in a draft that has it as weights."""
    from dspark_megatron.run.build import build_draft, build_target
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from dspark_megatron.training.heldout import HeldOut

    plan = check(config, runtime.world_size)
    heldout, draft = HeldOut.load(plan, runtime), build_draft(plan, runtime)
    folder = find_checkpoint(config.train.output_dir)
    state = load_checkpoint(folder, draft, None, weights="ema")
    config.evaluate.weights = "trained"  # of this draft
    parts = draft, None, build_target(plan, runtime)
    return heldout.estimate(state.__class__(4, 16), *parts, None).best.tau


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    path = make_chats(tmp_path_factory.mktemp("heldout") / "chats.jsonl", 30)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[24:]))
    return path


@pytest.mark.parametrize("optimizer, dtype", [({}, "float32"), (MUON, "bfloat16")])
def test_estimates_in_training_are_of_the_average(
    pool, tiny_run, heldout, tmp_path, optimizer, dtype
):
    """And training goes on as if there were none."""
    evaluate = {"heldout_files": [str(heldout)], "every": 2, "weights": "ema"}
    runs = [tmp_path / name for name in ("with", "without")]
    for run in runs:
        config = averaged(tiny_run, run, tp=2, optimizer=optimizer, dtype=dtype)
        if run.name == "with":
            vars(config.evaluate).update(evaluate)
        pool.run(run_training, world=4, tp=2, config=config)
    assert_same_curve(*map(curve, runs), rel=0)
    assert same_bits(tensors(runs[0], "trained"), tensors(runs[1], "trained"))
    config = averaged(tiny_run, runs[0], dtype=dtype)
    vars(config.evaluate).update(evaluate)
    (tau,) = pool.run(estimate_of_the_checkpoint, world=1, tp=1, config=config)
    lines = (runs[0] / "heldout.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["tau"] == pytest.approx(tau, rel=1e-5 if not optimizer else 1e-2)
    best = json.loads((find_checkpoint(runs[0]) / "dspark.json").read_text())["best"]
    assert best["conditions"]["weights"] == "ema"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["optimizer.ema_decay=0"], "optimizer.ema_decay .0.0?. must be > 0 and < 1"),
        (["optimizer.ema_decay=1"], "optimizer.ema_decay .1.0?. must be"),
        (["optimizer.ema_decay=yes"], "optimizer.ema_decay"),
        (["evaluate.weights=emma"], "evaluate.weights.*did you mean 'ema'"),
        (["evaluate.weights=ema", "evaluate.untrained=true"], "has no moving average yet"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*GIVEN, *wrong], trains=False)


def test_a_run_that_is_to_evaluate_an_average_keeps_one(tiny_run):
    with pytest.raises(ConfigError, match="evaluate.weights=ema .* optimizer.ema_decay is null"):
        tiny_config(tiny_run, evaluate={"weights": "ema"})
