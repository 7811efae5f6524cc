"""`dspark served measure` and `simulate`, also under their older names: files, output, refusals."""

import json

import measure_sps
import pytest
import simulate_serving
import torch

from dspark_megatron.cli.deliver.served.measure import ranks_of_a_node
from dspark_megatron.cli.exit_codes import BAD_INPUT, DONE
from dspark_megatron.cli.main import main
from dspark_megatron.config import Config
from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.serving.sps_table import (
    SampledSps,
    read_sps_table,
    write_sps_table,
)
from support.tiny_target import tiny_config
from support.tool_runs import run_python


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Records, a table and temperatures in a folder, in which commands are run."""
    monkeypatch.chdir(tmp_path)
    confidence = torch.tensor([[0.9, 0.8], [0.2, 0.9]])
    DraftRecords(
        confidence_logits=confidence.logit(),
        accept_rate=confidence,
        proposed=torch.tensor([2, 2]),
        accepted=torch.tensor([2, 0]),
        prompt=torch.tensor([0, 0]),
        facts={"block_size": 2},
    ).save(tmp_path / "drafts.safetensors")
    write_sps_table(tmp_path / "sps.json", SampledSps([1, 2, 3, 6], [10.0, 8.0, 5.5, 2.0], 6))
    (tmp_path / "dspark_sts.json").write_text('{"temperatures": [0.2, 0.2]}')
    return tmp_path


SIMULATE = ["--records=drafts.safetensors", "--sps=sps.json", "--output=serving.json"]
SIMULATE += ["--temperatures=.", "--rounds=64"]


def test_simulate_writes_figures_and_a_picture(files, capsys):
    command = ["served", "simulate", *SIMULATE, "--requests", "1", "2"]
    assert main(command) == DONE
    said = capsys.readouterr().out
    assert "early stopping" in said and "wrote serving.json and serving.png" in said
    written = json.loads((files / "serving.json").read_text())
    assert written["temperatures"] == [0.2, 0.2] and written["drafts"] == {"block_size": 2}
    rows = {(row["requests"], row["policy"]): row for row in written["figures"]}
    assert rows[1, "early stopping"]["tokens_per_second"] == pytest.approx(4 / (1 / 5.5 + 1 / 10))
    assert (files / "serving.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--json"]) == DONE
    assert json.loads(capsys.readouterr().out) == written
    (files / "serving.json").unlink()
    assert simulate_serving.main([*command[2:], "--quiet"]) == DONE
    assert capsys.readouterr().out == ""
    assert json.loads((files / "serving.json").read_text()) == written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--requests", "1", "3"], "and it ends at 6"),
        (["--output=none/a.json"], "must name a .json file in a folder that exists"),
        (["--records=none"], "none must be the draft records of an evaluation"),
        (["--temperatures=none"], "must hold a dspark_sts.json"),
        (["--lag=0"], "lag (0) must be >= 1"),
    ],
)
def test_what_cannot_be_simulated_is_one_sentence(files, capsys, words, message):
    assert main(["served", "simulate", *SIMULATE, "--requests=1", *words]) == BAD_INPUT
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (files / "serving.json").exists()


@pytest.fixture
def run_file(tiny_run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(tiny_config(tiny_run).to_yaml())
    return str(path)


def test_what_cannot_be_measured_is_refused_before_any_rank_starts(run_file, tmp_path, capsys):
    output = f"--output={tmp_path}/sps.json"
    for words, message in (
        ([run_file, "--rounds=0"], "--rounds (0) must be >= 1"),
        ([run_file, "target.dtyp=bfloat16"], "did you mean target.dtype?"),
        ([], "the run's config is missing"),
        ([run_file, "--gpus=0"], "--gpus (0) must be > 0"),
    ):
        assert main(["served", "measure", *words, output]) == BAD_INPUT, words
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert measure_sps.main(["--config", run_file, output, "--batch-tokens", "2"]) == BAD_INPUT
    assert "must hold 1 and larger numbers, is [2]" in capsys.readouterr().err


def test_as_many_ranks_as_a_copy_of_the_target_has():
    config = Config()
    config.parallel.tensor_parallel = 16
    assert ranks_of_a_node(config, nodes=1) == 16 and ranks_of_a_node(config, nodes=2) == 8


@pytest.mark.commands
@pytest.mark.slow
def test_measure_starts_its_ranks_and_writes_a_table(run_file, tmp_path):
    output = tmp_path / "new" / "sps.json"
    words = ["tools/measure_sps.py", "--config", run_file, "parallel.tensor_parallel=2", "--json"]
    words += ["--output", output, "--context-length=20", "--rounds=1", "--batch-tokens", "1", "3"]
    code, said = run_python(*words)
    assert code == DONE, said
    table = read_sps_table(output)
    assert isinstance(table, SampledSps) and table.sample_batch_tokens == [1, 3]
    record = json.JSONDecoder().raw_decode(said[said.index("{") :])[0]
    assert record["output"] == str(output)
    assert [step["steps_per_second"] for step in record["steps"]] == table.sample_steps_per_sec
    assert record["table"] == json.loads(output.read_text())
