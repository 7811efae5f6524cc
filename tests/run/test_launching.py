"""Under torchrun one message of one rank ends all."""

import pytest
import yaml

from support.tool_runs import run_python
from support.training_runs import finish, launch, torchrun


@pytest.mark.commands
def test_bad_settings_end_all_ranks_with_one_message(tiny_run, tmp_path):
    settings = {name: dict(values) for name, values in tiny_run.items()}
    settings["parallel"] = {"tensor_parallel": 2}
    settings["model"]["num_attention_heads"] = 9
    settings["model"]["num_key_value_heads"] = 3
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(settings))
    code, text = finish(launch(path, 2))
    assert code != 0
    assert text.count("must be divisible by parallel.tensor_parallel (2)") == 1
    assert "query heads (9), key/value heads (3)" in text and "that work here: [1]" in text


FAILING_JOB = """
import sys, torch
from dspark_megatron.run.ranks.runtime import launch, start
def main():
    with launch() as job:
        runtime = start(job, 1)
        if job.rank == 1:
            raise RuntimeError("disk on fire")
        torch.distributed.barrier()
if __name__ == "__main__":
    main()
"""


@pytest.mark.commands
def test_a_failure_on_one_rank_ends_all_with_its_message(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(FAILING_JOB)
    code, text = run_python(*torchrun(2, script))
    assert code != 0
    assert "rank 1 failed" in text and "disk on fire" in text
    assert "rank 0 failed" not in text, "only the first failure is shown"
