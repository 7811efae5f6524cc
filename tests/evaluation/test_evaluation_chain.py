"""From a checkpoint to temperatures, a scheduled evaluation and a report, by the commands."""

import json

from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.serving.sps_table import SampledSps, write_sps_table
from support.chat_lines import write_jsonl
from support.tool_runs import run_python, run_tool
from support.training_runs import write_config


def test_from_a_checkpoint_to_a_report(tiny_run, unbroken, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    texts = ("hello", "the hill", "inn well", "then all bells")
    write_jsonl(prompts, [{"prompt": text} for text in texts])
    evaluate = {"prompt_files": [str(prompts)], "max_new_tokens": 30, "temperature": 1.0}
    train = {"output_dir": str(unbroken)}
    config = write_config(tmp_path, tiny_run, train=train, evaluate=evaluate)
    earlier = unbroken / "evaluation.json"
    assert not earlier.exists()

    tool, records = "tools/calibrate_confidence.py", tmp_path / "drafts.safetensors"
    files = ["--records", records, "--output", tmp_path / "calibrated"]
    code, text = run_python(tool, "--config", config, *files)
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
    code, text = run_python(*program, *scheduled)
    assert code == 2 and "ends at 16" in text, "eight prompts of three slots need 32 tokens"
    code, text = run_python(*program, *scheduled, "evaluate.batch_size=4")
    assert code == 0, text
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["scheduler"] == "early_stopping" and written["iteration"] == 20
    assert "estimate" not in written["files"][str(prompts)], "it would be of whole drafts"

    page, calibration = tmp_path / "report.html", tmp_path / "calibrated/calibration.json"
    report = ["tools/evaluation_report.py", tmp_path / "evaluation.json", "--output", page]
    run_tool(*report, "--calibration", calibration)
    assert "early_stopping" in page.read_text(), "of one prompt, which has no intervals"
