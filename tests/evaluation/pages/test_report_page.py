"""The report of an evaluation: its contents, its pictures, and files that are refused."""

import json
import re

import pytest

from dspark_megatron.cli.exit_codes import BAD_INPUT
from dspark_megatron.cli.main import main
from dspark_megatron.evaluation.confidence.calibration import CalibrationSettings, calibrate
from dspark_megatron.evaluation.figures import acceptance
from dspark_megatron.evaluation.generation import Generation, Round
from support.html_pages import Page
from support.synthetic_records import synthetic_records

PLAIN = {
    "prompts": 5,
    "rounds": 40,
    "tau": 2.125,
    "accept_rate": [0.75, 0.5, None],
    "prefix_survival": [0.75, 0.375, None],
    "tokens_per_second": 12.5,
}
FULL = PLAIN | {
    "tau": 2.5,
    "speedup": 1.75,
    "confidence_intervals": {
        "tau": [2.25, 2.875],
        "accept_rate": [[0.5, 0.875], [0.25, 0.625], None],
        "prefix_survival": [[0.5, 0.875], [0.125, 0.5], [None, None]],
    },
}
BROKEN = {"accept_rate": [[0.5, 0.75], [0.25], None]}
EVALUATION = {
    "target": "<b>target</b>",
    "checkpoint": None,
    "iteration": 100,
    "temperature": 1.0,
    "block_size": 3,
    "files": {"data/plain$^$.jsonl": PLAIN, "data/<i>full.jsonl": FULL},
}
SIMULATED = dict(policy="whole & long", per_request=1.0, tau=1.5, verified=2.0, speedup=1.25)
SIMULATION = {
    "drafts": {"target": "<b>target</b>", "checkpoint": None, "iteration": 100, "block_size": 3},
    "figures": [
        {**SIMULATED, "requests": 1, "tokens_per_second": 11.0},
        {**SIMULATED, "requests": 64, "tokens_per_second": 222.0},
        {**SIMULATED, "policy": "cut", "requests": 64, "tokens_per_second": 333.0},
    ],
}


def calibration(**changes):
    records = synthetic_records(
        prompts=4, rounds=30, temperatures=[2.0] * 3, target="<b>target</b>", checkpoint=None
    )
    return calibrate(records, CalibrationSettings()) | changes


def report(tmp_path, evaluation=EVALUATION, **others):
    """The page of these files, by way of the command line."""
    arguments = ["report", str(tmp_path / "evaluation.json")]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    for name, content in others.items():
        (tmp_path / name).write_text(json.dumps(content))
        arguments += [f"--{name}", str(tmp_path / name)]
    code = main([*arguments, "--output", str(tmp_path / "report.html")])
    return (tmp_path / "report.html").read_text() if code == 0 else code


def test_the_page_holds_everything(tmp_path):
    notes = ["slot 2: <div>no surviving drafts"]
    page = report(tmp_path, calibration=calibration(notes=notes), simulation=SIMULATION)
    shown = Page(page)
    for cell in (
        "<b>target</b>",
        "<i>full.jsonl",
        "2.500\n2.250–2.875",
        "0.750\n0.500–0.875",
        "2.125",
        "1.750",
        "whole & long",
        "222.0",
    ):
        assert cell in shown.cells, cell
    assert "slot 2: <div>no surviving drafts" in shown.text
    assert "<b>" not in page and "<i>" not in page
    assert shown.drawn() == [
        *("acceptance by slot", "reliability", "confidence threshold", "serving simulation")
    ]


def test_a_file_of_one_prompt(tmp_path):
    """It has no intervals, which evaluation writes as null."""
    figures = acceptance([Generation([1, 2], [Round(3, 1, True)])], num_draft_tokens=3)
    page = report(tmp_path, EVALUATION | {"files": {"one.jsonl": figures}})
    assert "2.000" in Page(page).cells and "interval" not in page


def test_an_evaluation_alone_without_intervals_or_plain_decoding(tmp_path):
    page = report(tmp_path, EVALUATION | {"files": {"prompts.jsonl": PLAIN}})
    assert "interval" not in page and "speed-up" not in page and "Calibration" not in page
    assert {"2.125", "12.5"} <= {*Page(page).cells}
    assert page == report(tmp_path, EVALUATION | {"files": {"prompts.jsonl": PLAIN}})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"evaluation": {"untrained": PLAIN, "trained": PLAIN}}, "untrained, trained"),
        ({"evaluation": {"loss": [1.0]}}, "figures by prompt file"),
        ({"evaluation": EVALUATION | {"files": {"a": {"tau": 1.0}}}}, "no prompts, accept_rate"),
        ({"evaluation": EVALUATION | {"block_size": 4}}, "each of the 4 slots"),
        (
            {"evaluation": EVALUATION | {"files": {"a": FULL | {"tau": "2"}}}},
            "tau of a .* a number",
        ),
        (
            {"evaluation": EVALUATION | {"files": {"a": FULL | {"confidence_intervals": BROKEN}}}},
            "interval of accept_rate of a",
        ),
        ({"calibration": calibration(iteration=7)}, "iteration is 7 and 100"),
        ({"calibration": calibration(checkpoint="other")}, "checkpoint is 'other' and None"),
        ({"calibration": calibration(survival={})}, "figures before and after"),
        ({"calibration": {"temperatures": [1.0]}}, "lacks labels"),
        ({"simulation": {**SIMULATION, "drafts": {}}}, "target is None"),
        ({"simulation": {"throughput": 3}}, "list `figures`"),
        ({"simulation": {"figures": [SIMULATED]}}, "list `figures`"),
        (
            {"simulation": {"figures": [{**SIMULATION["figures"][0], "tau": "2"}]}},
            "must be numbers",
        ),
        ({"simulation": [1]}, "must hold a JSON object"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, files, message):
    assert report(tmp_path, **files) == BAD_INPUT
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "place",
    [
        *("survival", "survival.before", "survival.after.ece", "survival.before.bin_count"),
        *("threshold_sweep", "threshold_sweep.after.tau", "temperatures", "fit", "held_out.rounds"),
        "notes",
    ],
)
@pytest.mark.parametrize("junk", ["x", None, {"a": [1]}])
def test_a_calibration_of_anything_else_is_refused(tmp_path, capsys, place, junk):
    content = json.loads(json.dumps(calibration()))
    *parents, last = place.split(".")
    part = content
    for parent in parents:
        part = part[parent]
    part[last] = junk
    assert report(tmp_path, calibration=content) == BAD_INPUT
    assert "calibrate again" in capsys.readouterr().err
