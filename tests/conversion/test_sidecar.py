"""Temperatures and the model card go with the weights that they are of."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_megatron.conversion.export import convert_folder
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.checkpoints.named import NamedCheckpoint
from dspark_megatron.storage.checksums import write_checksums
from support.draft_folders import export_fp32, import_, write_checkpoint
from support.shapes import FOLDER_SHAPES, VANILLA


def test_temperatures_are_carried_along(tmp_path, target, draft):
    good = {"temperatures": [1.0, 0.5, 2.0], "dataset": "", "num_samples": 3}
    (draft / "dspark_sts.json").write_text(json.dumps(good))
    other = convert_folder(draft, target, tmp_path / "other", WriteOptions("specforge"))
    assert json.loads((other / "dspark_sts.json").read_text()) == good
    assert "dspark_sts.json" in (other / "README.md").read_text()
    import_(draft, target, tmp_path / "imported")
    back = export_fp32(tmp_path / "imported", target, tmp_path / "back")
    assert json.loads((back / "dspark_sts.json").read_text()) == good
    (draft / "dspark_sts.json").write_text(json.dumps({"temperatures": [1.0, 0.0, 1.0]}))
    for bad in ([1.0, 0.0, 1.0], [1.0, float("inf"), 1.0], [1.0, True, 1.0], [1.0, 1.0]):
        (draft / "dspark_sts.json").write_text(json.dumps({"temperatures": bad}))
        with pytest.raises(
            ConfigError, match="one positive temperature for each of the 3 draft tokens"
        ):
            convert_folder(draft, target, tmp_path / "third", WriteOptions())


def test_temperatures_of_another_iteration_are_refused(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", VANILLA)
    temperatures = {"temperatures": [1.0, 0.5, 2.0], "iteration": 100}
    (run / "dspark_sts.json").write_text(json.dumps(temperatures))
    out = export_fp32(run, target, tmp_path / "out")
    import_(out, target, tmp_path / "back")
    export_fp32(tmp_path / "back", target, tmp_path / "again")
    write_checkpoint(run, VANILLA, iteration=200)
    with pytest.raises(ConfigError, match="was calibrated for iteration 100, this draft is of 200"):
        export_fp32(run, target, tmp_path / "third")


def test_what_was_made_in_an_export_is_not_replaced(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", VANILLA)
    (run / "dspark_sts.json").write_text(json.dumps({"temperatures": [1.0, 0.5, 2.0]}))
    out = export_fp32(run, target, tmp_path / "out")
    export_fp32(run, target, out, force=True)
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("## License", "## Licence\n\nMIT"))
    (out / "dspark_sts.json").write_text(json.dumps({"temperatures": [3.0, 3.0, 3.0]}))
    with pytest.raises(ConfigError, match="dspark_sts.json, which is not .* README.md, which was"):
        export_fp32(run, target, out, force=True)
    (out / "README.md").write_text(card)
    (out / "dspark_sts.json").unlink()
    export_fp32(run, target, out, force=True)


def test_the_same_export_and_import_may_be_written_again(tmp_path, target):
    run, out = write_checkpoint(tmp_path / "run", VANILLA), tmp_path / "out"
    export_fp32(run, target, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    export_fp32(run, target, out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    for other in ({"dtype": torch.bfloat16}, {"shared_weights": False}):
        with pytest.raises(ConfigError, match="of other weights or settings; give --force"):
            export_fp32(run, target, out, **other)
    imported = import_(out, target, tmp_path / "imported")
    assert import_(out, target, tmp_path / "imported") == imported

    tensors = load_file(out / "model.safetensors")
    tensors["fc.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="of other weights or settings; give --force"):
        export_fp32(run, target, out)
    with pytest.raises(ConfigError, match="is there already and not empty"):
        import_(out, target, tmp_path / "imported")


def test_a_newer_calibration_of_the_same_checkpoint_takes_the_place_of_an_older(tmp_path, target):
    run, out = write_checkpoint(tmp_path / "run", VANILLA), tmp_path / "out"
    of = {"iteration": 100, "checkpoint": "run/checkpoints/iter_0000100"}
    for temperature in (2.0, 3.0):
        sidecar = {"temperatures": [temperature] * VANILLA.block_size, **of}
        (run / "dspark_sts.json").write_text(json.dumps(sidecar))
        export_fp32(run, target, out)
        assert json.loads((out / "dspark_sts.json").read_text()) == sidecar
    (out / "dspark_sts.json").write_text(json.dumps({**sidecar, "iteration": 50}))
    with pytest.raises(ConfigError, match="would delete its dspark_sts.json"):
        export_fp32(run, target, out, force=True)


def test_the_card_has_what_is_known(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", FOLDER_SHAPES["gated"])
    figures = {"heldout.jsonl": {"prompts": 5, "tau": 3.25}}
    evaluation = {"iteration": 100, "temperature": 0.0, "files": figures}
    evaluation["checkpoint"] = "/elsewhere/run/checkpoints/iter_0000100"
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    card = (
        export_fp32(run, target, tmp_path / "dspark", target_name="org/t") / "README.md"
    ).read_text()
    assert "# DSpark drafter for org/t" in card and "gated Markov head of rank 5" in card
    assert "100 iterations over 800 samples" in card
    assert "| heldout.jsonl | 5 | 3.250 |" in card
    assert "--speculative-algorithm DSPARK" in card and "vllm serve" not in card, "gated"
    vanilla = write_checkpoint(tmp_path / "vanilla", VANILLA)
    card = (
        export_fp32(vanilla, target, tmp_path / "v", target_name="org/t") / "README.md"
    ).read_text()
    assert "vllm serve org/t --speculative-config" in card and '"num_speculative_tokens": 3' in card
    card = (export_fp32(vanilla, target, tmp_path / "m", "modelopt") / "README.md").read_text()
    assert "Neither vLLM nor SGLang loads this folder" in card
    for other in ("run/checkpoints/iter_0000050", "other/checkpoints/iter_0000100", None):
        (run / "evaluation.json").write_text(json.dumps({**evaluation, "checkpoint": other}))
        shutil.rmtree(tmp_path / "dspark")
        card = (export_fp32(run, target, tmp_path / "dspark") / "README.md").read_text()
        assert "tau" not in card, "the evaluation is of another checkpoint"
    for malformed in ({**evaluation, "files": {"a": {}}}, {**evaluation, "files": []}, [], {}):
        (run / "evaluation.json").write_text(json.dumps(malformed))
        with pytest.raises(ConfigError, match="evaluation.json is not as evaluation writes it"):
            export_fp32(run, target, tmp_path / "third")


def calibrated_run(folder, seed=0, with_digest=True):
    """A run with temperatures for its checkpoint and an evaluation of it."""
    run = write_checkpoint(folder, VANILLA, seed=seed)
    checkpoint = (run / "checkpoints" / "iter_0000100").absolute()
    write_checksums(checkpoint)
    of = {"iteration": 100, **NamedCheckpoint.at(checkpoint).facts()}
    if not with_digest:  # as an older version wrote it
        del of["checkpoint_digest"]
    (run / "dspark_sts.json").write_text(json.dumps({"temperatures": [1.0, 0.5, 2.0], **of}))
    files = {"heldout.jsonl": {"prompts": 5, "tau": 3.25}}
    (run / "evaluation.json").write_text(json.dumps({**of, "temperature": 0.0, "files": files}))
    return run


@pytest.mark.parametrize("with_digest", [True, False])
def test_a_run_under_another_name_exports_its_temperatures(
    tmp_path, target, monkeypatch, with_digest
):
    run = calibrated_run(tmp_path / "runs" / "x", with_digest=with_digest)
    moved = tmp_path / "archive" / "y"
    moved.parent.mkdir()
    run.rename(moved)
    out = export_fp32(moved, target, tmp_path / "out")
    assert json.loads((out / "dspark_sts.json").read_text())["temperatures"] == [1.0, 0.5, 2.0]
    assert ("| heldout.jsonl | 5 | 3.250 |" in (out / "README.md").read_text()) == with_digest
    monkeypatch.chdir(moved)
    export_fp32(".", target, tmp_path / "from within")


@pytest.mark.parametrize("with_digest", [True, False])
def test_temperatures_of_another_run_are_refused(tmp_path, target, with_digest):
    """Under the same name, where a digest tells them apart; without one, while the run that they
    name is there."""
    run = calibrated_run(tmp_path / "runs" / "x", with_digest=with_digest)
    other = calibrated_run(tmp_path / "others" / ("x" if with_digest else "y"), seed=1)
    shutil.copyfile(run / "dspark_sts.json", other / "dspark_sts.json")
    if with_digest:
        shutil.rmtree(run)
    with pytest.raises(ConfigError, match="was calibrated for .*runs/x/.*, this draft is .*others"):
        export_fp32(other, target, tmp_path / "out")
