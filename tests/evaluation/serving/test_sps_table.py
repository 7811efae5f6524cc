"""Tables of steps per second: SGLang's two forms, read, written and looked up."""

import json

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.serving.sps_table import (
    AdditiveSps,
    SampledSps,
    interpolated,
    measured_table,
    read_sps_table,
    sps_of_step,
    write_sps_table,
)

SAMPLED = SampledSps([4, 8, 16], [100.0, 80.0, 20.0], 20)
ADDITIVE = AdditiveSps(0.1, [2, 4], [0.0, 0.2], [4, 8, 16], [0.0, 0.1, 0.7])


def test_floor_look_up():
    tokens = torch.tensor([1, 4, 7, 8, 15, 16, 20])
    sps = SAMPLED.steps_per_second(tokens, requests=1)
    assert sps.tolist() == [100, 100, 100, 80, 80, 20, 20] and sps.dtype == torch.float64


def test_additive_look_up():
    """bias + alpha(requests) + theta(tokens), straight between the points, constant outside."""
    tokens = torch.tensor([1, 4, 6, 12, 30])
    for requests, alpha in ((1, 0.0), (3, 0.1), (9, 0.2)):
        seconds = torch.tensor([0.1, 0.1, 0.15, 0.5, 0.8], dtype=torch.float64) + alpha
        torch.testing.assert_close(ADDITIVE.steps_per_second(tokens, requests), 1 / seconds)


def test_the_steps_of_a_schedule():
    assert sps_of_step(SAMPLED, 3, 3).tolist() == [100.0] * 5 + [80.0] * 5
    for table, requests, slots, message in (
        (SAMPLED, 3, 7, "3 requests of 7 slots .* for 24 verified tokens, and it ends at 16"),
        (ADDITIVE, 3, 7, "for 24 verified tokens, and it ends at 16"),
        (ADDITIVE, 5, 1, "for 5 requests, and it ends at 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            sps_of_step(table, requests, slots)


def test_interpolation_meets_the_points():
    lines = interpolated(SAMPLED)
    sps = lines.steps_per_second(torch.tensor([4, 8, 12, 16]), requests=5)
    middle = 2 / (1 / 80 + 1 / 20)
    assert sps.tolist() == pytest.approx([100, 80, middle, 20], rel=1e-12)


def test_a_table_of_measured_steps():
    by_tokens = {4: 0.25, 1: 0.1, 2: 0.125}
    sampled = measured_table(by_tokens, {})
    assert sampled == SampledSps([1, 2, 4], [10.0, 8.0, 4.0], 4)
    # Three tokens of one request would take 0.1875 s; two tokens came out faster than alone.
    table = measured_table(by_tokens, {3: 0.2, 2: 0.12})
    assert table.bs_probes == [1, 2, 3]
    assert table.alpha_seconds == pytest.approx([0, 0, 0.0125])
    for requests, seconds in ((1, 0.25), (3, 0.2625)):
        sps = table.steps_per_second(torch.tensor([4]), requests)
        assert float(sps) == pytest.approx(1 / seconds)


@pytest.mark.parametrize("table", [SAMPLED, ADDITIVE])
def test_a_round_trip(tmp_path, table):
    write_sps_table(tmp_path / "sps.json", table)
    assert read_sps_table(tmp_path / "sps.json") == table


SAMPLED_FILE = {
    "sample_batch_tokens": [1, 2],
    "sample_steps_per_sec": [5, 4.5],
    "max_batch_tokens": 2,
}
ADDITIVE_FILE = {
    "bias_seconds": 0.1,
    "bs_probes": [1],
    "alpha_seconds": [0],
    "m_probes": [1, 2],
    "theta_seconds": [0, 0.5],
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**SAMPLED_FILE, "sample_batch_tokens": [2, 1]}, "strictly increasing integers"),
        ({**SAMPLED_FILE, "sample_batch_tokens": [1, 2.5]}, "strictly increasing integers"),
        ({**SAMPLED_FILE, "sample_batch_tokens": [0, 2]}, ">= 1, is"),
        ({**SAMPLED_FILE, "sample_batch_tokens": [1]}, "at least 2"),
        ({**SAMPLED_FILE, "sample_steps_per_sec": [5.0]}, r"2 finite number\(s\)"),
        ({**SAMPLED_FILE, "sample_steps_per_sec": [5.0, float("nan")]}, "finite"),
        ({**SAMPLED_FILE, "sample_steps_per_sec": [5.0, 0]}, "must be positive"),
        ({**SAMPLED_FILE, "sample_steps_per_sec": "fast"}, "finite"),
        ({**SAMPLED_FILE, "max_batch_tokens": 1}, r"max_batch_tokens \(1\)"),
        ({**SAMPLED_FILE, "units": "tokens"}, "exactly the keys"),
        ({**ADDITIVE_FILE, "bias_seconds": 0}, r"bias_seconds \(0\) must be positive"),
        ({**ADDITIVE_FILE, "theta_seconds": [0, -0.5]}, "theta_seconds must hold 2"),
        ({**ADDITIVE_FILE, "m_probes": [1]}, "m_probes must be a list of at least 2"),
        ({**ADDITIVE_FILE, "bs_probes": []}, "bs_probes must be a list of at least 1"),
        ([], "has a list"),
    ],
)
def test_other_tables_are_refused(tmp_path, content, message):
    file = tmp_path / "sps.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as caught:
        read_sps_table(file)
    assert "sps.json" in str(caught.value)


def test_files_that_are_no_json_are_refused(tmp_path):
    (tmp_path / "text.json").write_text("SPS")
    for name in ("text.json", "missing.json"):
        with pytest.raises(ConfigError, match=name):
            read_sps_table(tmp_path / name)


def test_the_two_files_are_read(tmp_path):
    for content, form in ((SAMPLED_FILE, SampledSps), (ADDITIVE_FILE, AdditiveSps)):
        (tmp_path / "sps.json").write_text(json.dumps(content))
        assert isinstance(read_sps_table(tmp_path / "sps.json"), form)
