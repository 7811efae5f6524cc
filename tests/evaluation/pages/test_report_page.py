"""The report of an evaluation: its contents, its pictures, and files that are refused."""

import base64
import json
import re

import evaluation_report
import pytest
from matplotlib import image

from dspark_megatron.evaluation.confidence.calibration import CalibrationSettings, calibrate
from dspark_megatron.evaluation.figures import acceptance
from dspark_megatron.evaluation.generation import Generation, Round
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
    arguments = [str(tmp_path / "evaluation.json"), "--output", str(tmp_path / "report.html")]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    for name, content in others.items():
        (tmp_path / name).write_text(json.dumps(content))
        arguments += [f"--{name}", str(tmp_path / name)]
    evaluation_report.main(arguments)
    return (tmp_path / "report.html").read_text()


def cells(page):
    """Text of all table cells."""
    return re.findall(r"<t[dh]>(.*?)</t[dh]>", page, flags=re.DOTALL)


def test_the_page_holds_everything(tmp_path):
    notes = ["slot 2: <div>no surviving drafts"]
    page = report(tmp_path, calibration=calibration(notes=notes), simulation=SIMULATION)
    found = cells(page)
    for cell in (
        "&lt;b&gt;target&lt;/b&gt;",
        "&lt;i&gt;full.jsonl",
        "2.500\n2.250–2.875",
        "0.750\n0.500–0.875",
        "2.125",
        "1.750",
        "whole &amp; long",
        "222.0",
    ):
        assert cell in found, cell
    assert "slot 2: &lt;div&gt;no surviving drafts" in page
    assert "<b>" not in page and "<i>" not in page and not re.search(r"src=\"(?!data:)", page)
    pictures = re.findall(r"base64,([^\"]+)", page)
    assert len(pictures) == 4
    for picture in pictures:
        (tmp_path / "picture.png").write_bytes(base64.b64decode(picture))
        pixels = image.imread(tmp_path / "picture.png")
        assert pixels.shape[1] > 500 and pixels.std() > 0.01  # something is drawn


def test_a_file_of_one_prompt(tmp_path):
    """It has no intervals, which evaluation writes as null."""
    figures = acceptance([Generation([1, 2], [Round(3, 1, True)])], num_draft_tokens=3)
    page = report(tmp_path, EVALUATION | {"files": {"one.jsonl": figures}})
    assert "2.000" in cells(page) and "interval" not in page


def test_an_evaluation_alone_without_intervals_or_plain_decoding(tmp_path):
    page = report(tmp_path, EVALUATION | {"files": {"prompts.jsonl": PLAIN}})
    assert "interval" not in page and "speed-up" not in page and "Calibration" not in page
    assert "2.125" in cells(page) and "12.5" in cells(page)
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
def test_other_files_are_refused(tmp_path, files, message):
    with pytest.raises(SystemExit, match=message):
        report(tmp_path, **files)
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
def test_a_calibration_of_anything_else_is_refused(tmp_path, place, junk):
    content = json.loads(json.dumps(calibration()))
    *parents, last = place.split(".")
    part = content
    for parent in parents:
        part = part[parent]
    part[last] = junk
    with pytest.raises(SystemExit, match="calibrate again"):
        report(tmp_path, calibration=content)
