"""From a checkpoint to temperatures, a scheduled evaluation and a report, by the commands."""

import json
import os
import subprocess
import sys

from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.serving.sps_table import SampledSps, write_sps_table
from support.paths import ROOT
from support.training_runs import write_config


def run(*command):
    """A command on one rank; returns its output, and fails with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def test_from_a_checkpoint_to_a_report(tiny_run, unbroken, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text} for text in ("hello", "the hill", "inn well", "then all bells")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate = {"prompt_files": [str(prompts)], "max_new_tokens": 30, "temperature": 1.0}
    train = {"output_dir": str(unbroken)}
    config = write_config(tmp_path, tiny_run, train=train, evaluate=evaluate)
    earlier = unbroken / "evaluation.json"
    assert not earlier.exists()

    tool, records = ROOT / "tools" / "calibrate_confidence.py", tmp_path / "drafts.safetensors"
    files = ["--records", records, "--output", tmp_path / "calibrated"]
    code, text = run(tool, "--config", config, *files)
    assert code == 0 and "temperatures fitted on" in text, text
    assert not earlier.exists(), "the run's own evaluation is not this one"
    assert DraftRecords.load(records).facts["prompts"] == [4]

    table = SampledSps([1, 2, 4, 8, 16], [1.0, 0.9, 0.7, 0.4, 0.22], 16)
    write_sps_table(tmp_path / "sps.json", table)
    scheduled = [
        "evaluate.scheduler=early_stopping",
        f"evaluate.sps_table={tmp_path / 'sps.json'}",
        f"evaluate.temperatures={tmp_path / 'calibrated'}",
        f"evaluate.output={tmp_path / 'evaluation.json'}",
        "evaluate.max_prompts=1",
    ]
    program = ["-m", "dspark_megatron.evaluate", "--config", config]
    code, text = run(*program, *scheduled)
    assert code == 1 and "ends at 16" in text, "eight prompts of three slots need 32 tokens"
    code, text = run(*program, *scheduled, "evaluate.batch_size=4")
    assert code == 0, text
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["scheduler"] == "early_stopping" and written["iteration"] == 20
    assert "estimate" not in written["files"][str(prompts)], "it would be of whole drafts"

    report = [
        tmp_path / "evaluation.json",
        "--calibration",
        tmp_path / "calibrated/calibration.json",
    ]
    page = tmp_path / "report.html"
    code, text = run(ROOT / "tools" / "evaluation_report.py", *report, "--output", page)
    assert code == 0, text
    assert "early_stopping" in page.read_text(), "of one prompt, which has no intervals"
