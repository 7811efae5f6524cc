"""Whatever is wrong with a checkpoint, every command that reads one names the file, what is wrong
and the newest older checkpoint that is whole."""

import shutil
from pathlib import Path

import pytest

from support.damage import CONTENTS, FILES, KINDS
from support.tiny_target import tiny_config
from support.training_runs import run_training

OF_FILES = {f"{name}: {kind}": (name, kind) for name in FILES for kind in KINDS}
UNSEEN = ("flipped", "zeroed", "noise", "longer", "of another iteration")
"""What an older version's checkpoint, which has no checksums, may hide."""


@pytest.fixture(scope="module")
def run(pool, tiny_run, tmp_path_factory):
    """A config whose run has three checkpoints."""
    output = tmp_path_factory.mktemp("damaged") / "run"
    train = {"output_dir": str(output), "iterations": 3, "save_every": 1}
    config = tiny_config(tiny_run, train=train)
    pool.run(run_training, world=1, tp=1, config=config)
    config.train.iterations = 4
    return config


def readers(runtime, config, folder):
    """What reads a run's newest checkpoint: by name, functions that give no answer."""
    from dspark_megatron.conversion.export import export_checkpoint
    from dspark_megatron.evaluation.drafts import check_draft
    from dspark_megatron.mcore.optimizer import build_optimizer, wrap_data_parallel
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from dspark_megatron.run.initial.initial_weights import InitialWeights
    from dspark_megatron.run.known_draft import evaluated_draft, with_draft_of
    from dspark_megatron.training.resuming import checkpoint_to_resume, finished_state

    run = Path(config.train.output_dir)
    plan = check(config, 1)
    draft = build_draft(plan, runtime)
    wrapped = wrap_data_parallel(draft, config.optimizer)
    optimizer = build_optimizer(config.optimizer, wrapped, plan.dtype)
    started = tiny_config(config.to_dict(), train={"initial_checkpoint": str(run)})
    start = check(started, 1)

    def resume():
        chosen = checkpoint_to_resume(plan, run / "checkpoints", runtime)
        finished_state(plan, chosen, run, runtime)
        load_checkpoint(chosen, draft, optimizer)

    def evaluate():
        chosen = evaluated_draft(config)
        with_draft_of(config, chosen)
        check_draft(plan, chosen)
        load_checkpoint(chosen, draft, None)

    def start_from():
        InitialWeights.open(start).load(draft, tp_group=runtime.tp_group)

    def export():
        export_checkpoint(run, config.target.path, folder / "export")

    return {"resume": resume, "evaluate": evaluate, "start": start_from, "export": export}


def answers(runtime, config, folder, has_checksums):
    """By damage and reader: the class and text of what it raises; empty where nothing is wrong."""
    run = Path(config.train.output_dir)
    whole = folder / "whole"
    shutil.copytree(run, whole)
    if not has_checksums:
        for file in whole.rglob("checksums.json"):
            file.unlink()
    found = {}
    commands = readers(runtime, config, folder)
    of_files = {name: (KINDS[kind], file) for name, (file, kind) in OF_FILES.items()}
    for name, (damage, file) in (of_files | {n: (d, "") for n, d in CONTENTS.items()}).items():
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        iteration = run / "checkpoints" / "iter_0000003"
        named = iteration / name.partition(":")[0]
        if not named.exists():
            continue  # another version of Megatron-Core writes it
        before = named.read_bytes()
        damage(iteration / file)
        if named.is_file() and named.read_bytes() == before:
            continue  # it has nothing of its iteration
        for reader, read in commands.items():
            shutil.rmtree(folder / "export", ignore_errors=True)
            found[name, reader] = "", ""
            try:
                read()
            except Exception as error:
                found[name, reader] = type(error).__name__, str(error)
    return found


@pytest.mark.parametrize("has_checksums", [True, False], ids=["checksums", "older"])
def test_every_reader_names_the_file_and_the_way_out(pool, run, tmp_path, has_checksums):
    found = pool.run(
        answers, world=1, tp=1, config=run, folder=tmp_path, has_checksums=has_checksums
    )[0]
    assert len({name for name, _ in found}) > 70
    for (name, reader), (kind, text) in found.items():
        file, _, damage = name.partition(": ")
        # Without checksums another byte is seen as another value, if at all.
        another = not kind or "another run" in text or "another target" in text
        if another and damage in UNSEEN and not has_checksums:
            continue
        if name == "checksums.json: missing":
            assert not kind
            continue
        assert kind == "ConfigError", f"{name}, {reader}: {kind or 'nothing is said'} {text}"
        assert "\n" not in text
        assert file in text, f"{name}, {reader}: {text}"
        assert "iter_0000002" in text and "train.resume_from=2" in text, f"{name}: {text}"
