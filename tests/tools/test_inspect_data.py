"""The figures of tools/inspect_data.py against a count by hand, and what it refuses."""

import json
import re

import inspect_data as tool
import pytest
import yaml

from support.tiny_target import tiny_config


@pytest.fixture
def inspect(tiny_run, tmp_path, capsys):
    """Inspects these (length, supervised) samples; the exit code and what was printed."""

    def inspect(samples, *arguments, **data):
        rows = [
            {"input_ids": [5] * length, "loss_mask": [0] * (length - count) + [1] * count}
            for length, count in samples
        ]
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train_files": [str(file)], "min_loss_tokens": 1, "max_length": 20, **data}
        config = tiny_config(tiny_run, data=data, train={"micro_batch_size": 2})
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        code = tool.main(["--config", str(path), *arguments])
        out, error = capsys.readouterr()
        return code, out + error

    return inspect


def figures(text, name):
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [float(number) for number in re.findall(r"[\d.]+", line.removeprefix(name))]


def test_the_figures(inspect):
    code, text = inspect([(10, 4), (20, 9), (30, 20), (3, 0), (10, 1)])
    assert code == 0
    assert "kept 3 of 5 samples with 50 tokens, 23 of them" in text
    assert "dropped 1 with too few supervised tokens and 1 without an anchor; cut 1" in text
    assert figures(text, "tokens") == [10, 10, 20, 20, 20, 20, 16.7]
    assert figures(text, "supervised tokens") == [4, 4, 9, 10, 10, 10, 7.7]
    assert figures(text, "candidate anchors") == [3, 3, 8, 9, 9, 9, 6.7]
    assert "anchors: 15 of 20 candidates" in text  # at most 6 a sample: 3 + 6 + 6
    assert "⟦" in text and "\x1b" not in text


@pytest.mark.parametrize("lengths, padding", [([10, 20], "25.0%"), ([20, 20], "0.0%")])
def test_padding_of_micro_batches(inspect, lengths, padding):
    assert f"padding: {padding} of" in inspect([(length, 5) for length in lengths])[1]


def test_shares_are_shown(inspect, tmp_path):
    path = tmp_path / "data.jsonl"
    entries = {"train_files": [str(path), f"{tmp_path}/*.jsonl"], "weights": [3.0, 1.0]}
    _, text = inspect([(10, 5)] * 4, **entries)
    assert f"{path}: 4 samples, 6 in an epoch (1.50 times each)" in text
    assert "*.jsonl: 4 samples, 2 in an epoch (0.50 times each)" in text


def test_refusals(inspect):
    assert inspect([(10, 5)], "--sample", "1") == (
        2,
        "error: --sample (1) must be one of the 1 samples, from 0\n",
    )
    code, text = inspect([(10, 5)], "--held-out")
    assert code == 2 and "heldout_files is empty" in text
    code, text = inspect([(10, 5)], "data.max_length=1")
    assert code == 2 and "data.max_length (1) must be >= 2" in text


def test_target_and_data_are_all_it_needs(tiny_run, tmp_path, capsys):
    """Without a draft, and with the taps and mask token of none."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"input_ids": [5] * 30, "loss_mask": [0] * 10 + [1] * 20}) + "\n")
    keys = [f"target.path={tiny_run['target']['path']}", f"data.train_files=[{file}]"]
    code = tool.main(keys)
    out, error = capsys.readouterr()
    assert code == 0 and "kept 1 of 1 samples" in out, error
    assert tool.main([*keys, "model.block_size=11"]) == 2  # 22 supervised tokens are wanted
    assert "all 1 samples" in capsys.readouterr().err
    assert tool.main(keys[:1]) == 2
    assert "data.train_files is empty" in capsys.readouterr().err
