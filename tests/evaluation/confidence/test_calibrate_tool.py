"""tools/calibrate_confidence.py: what it writes, and what it does not overwrite."""

import contextlib
import io
import json
import math

import calibrate_confidence
import pytest
import torch

from dspark_megatron.conversion.sidecar import check_sidecar
from support.synthetic_records import synthetic_records

WRITTEN = ["calibration.json", "dspark_sts.json", "reliability.png", "threshold_sweep.png"]


def run(tmp_path, *options, edit=lambda records: None, **changes):
    """Calibrate on 600 rounds; returns the folder that was written to."""
    records = synthetic_records(prompts=20, rounds=30, temperatures=[1.5, 2.0, 2.5], **changes)
    edit(records)
    records.save(tmp_path / "drafts.safetensors")
    files = ["--records", tmp_path / "drafts.safetensors", "--output", tmp_path / "export"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = calibrate_confidence.main([*map(str, files), *options])
    if code:
        assert code == 2
        raise SystemExit(said.getvalue())
    return tmp_path / "export"


def test_everything_is_written(tmp_path, capsys):
    folder = run(tmp_path, "--labels", "expected", "--bins", "10")
    assert sorted(path.name for path in folder.iterdir()) == WRITTEN
    assert check_sidecar(folder, num_draft_tokens=3, iteration=100)
    sidecar = json.loads((folder / "dspark_sts.json").read_text())
    result = json.loads((folder / "calibration.json").read_text())
    assert sidecar["temperatures"] == result["temperatures"] == result["fitted_temperatures"]
    assert sidecar["note"] == "temperatures other than 1 are used in slots 0, 1, 2"
    assert sidecar["num_samples"] == 300 and sidecar["dataset"] == "prompts.jsonl"
    assert sidecar["ece_after"] == result["survival"]["after"]["ece"]
    assert all(b < a for a, b in zip(sidecar["ece_before"], sidecar["ece_after"], strict=True))
    assert result["labels"] == "expected" and result["held_out"] == {"prompts": 10, "rounds": 300}
    for name in ("survival", "confidence"):
        figures = result[name]["after"]
        assert [sum(counts) for counts in figures["bin_count"]] == figures["rounds"]
        assert len(figures["bin_predicted"][0]) == 10
    for name in WRITTEN[2:]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "300 rounds of 10 prompts" in said and sidecar["note"] in said
    first = {name: (folder / name).read_bytes() for name in WRITTEN}
    run(tmp_path, "--labels", "expected", "--bins", "10")
    assert first == {name: (folder / name).read_bytes() for name in WRITTEN}


def test_a_slot_without_figures_leaves_the_lists_of_sglang_empty(tmp_path):
    def stopped(records):
        """Every prompt has one round, which a stop token in slot 1 ended."""
        records.accepted.fill_(2)
        records.proposed.fill_(2)
        records.prompt.copy_(torch.arange(len(records)))

    folder = run(tmp_path, edit=stopped)
    sidecar = json.loads((folder / "dspark_sts.json").read_text())
    assert sidecar["ece_before"] == sidecar["ece_after"] == []
    assert sidecar["temperatures"][2] == 1.0


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"temperatures": [1.0] * 3}, "not of a calibration"),
        (
            {"temperatures": [1.0] * 3, "iteration": 50, "checkpoint": "a"},
            "is of iteration 50 of a, the records are of",
        ),
        (
            {
                "temperatures": [1.0] * 3,
                "iteration": 100,
                "checkpoint": "runs/y/checkpoints/iter_0000100",
            },
            "of runs/y/.*, the records are of iteration 100 of runs/x/",
        ),
    ],
)
def test_other_temperatures_are_kept(tmp_path, own, message):
    (tmp_path / "export").mkdir()
    file = tmp_path / "export" / "dspark_sts.json"
    file.write_text(json.dumps(own))
    with pytest.raises(SystemExit, match=message):
        run(tmp_path)
    assert [path.name for path in file.parent.iterdir()] == ["dspark_sts.json"]
    assert json.loads(file.read_text()) == own
    assert (
        json.loads((run(tmp_path, "--force") / "dspark_sts.json").read_text())["iteration"] == 100
    )


def test_what_cannot_be_done_is_said(tmp_path):
    def no_head(records):
        records.confidence_logits.fill_(math.nan)

    with pytest.raises(SystemExit, match="without a confidence head"):
        run(tmp_path, edit=no_head)
    with pytest.raises(SystemExit, match="bins must be at least 2"):
        run(tmp_path, "--bins", "1")
    assert not (tmp_path / "export").exists()
    (tmp_path / "export").mkdir()
    config = {"dflash_config": {"block_size": 7}}
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="7 draft tokens a block, the records are of 3"):
        run(tmp_path, "--force")
    (tmp_path / "export" / "config.json").unlink()
    (tmp_path / "export").rmdir()
    (tmp_path / "export").write_text("a file")
    with pytest.raises(SystemExit, match="cannot write .*/export/.*: File exists"):
        run(tmp_path)


def test_nothing_partial_is_left(tmp_path):
    (tmp_path / "export" / "threshold_sweep.png").mkdir(parents=True)  # cannot be replaced
    with pytest.raises(SystemExit, match="cannot write .*/threshold_sweep.png: Is a directory"):
        run(tmp_path)
    assert not list((tmp_path / "export").glob(".partial*"))
    assert not (tmp_path / "export" / "dspark_sts.json").exists()
