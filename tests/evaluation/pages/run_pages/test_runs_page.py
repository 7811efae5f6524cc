"""`dspark report`: runs side by side on one page, what it says of files that are not there, and the
folders that it refuses."""

import json
import shlex

import pytest

from dspark_megatron.cli.exit_codes import BAD_INPUT, DONE
from dspark_megatron.cli.main import main
from dspark_megatron.config.loading import load_config
from dspark_megatron.evaluation.confidence.calibration import CalibrationSettings, calibrate
from dspark_megatron.evaluation.pages.run_pages.comparison import cautions, summary
from dspark_megatron.evaluation.pages.run_pages.curves import MOST_POINTS, Steps
from dspark_megatron.evaluation.pages.run_pages.run_files import read_run
from dspark_megatron.evaluation.pages.run_pages.runs_page import name_runs
from support.html_pages import Page
from support.synthetic_records import synthetic_records
from support.tiny_target import tiny_config, tiny_settings

STEPS = 12
DRAFT = {"target": "target", "checkpoint": None, "iteration": STEPS, "block_size": 3}
FIGURES = {
    "prompts": 4,
    "tau": 2.5,
    "accept_rate": [0.75, 0.5, None],
    "prefix_survival": [0.75, 0.375, None],
    "identical_to_plain": 4,
    "confidence_intervals": {"tau": [2.25, 2.875]},
}
EVALUATION = {**DRAFT, "temperature": 0.0, "files": {"heldout.jsonl": FIGURES}}
UNTRAINED = {**EVALUATION, "iteration": 0, "files": {"heldout.jsonl": FIGURES | {"tau": 1.125}}}


def metrics(steps=STEPS, batch=4, **more):
    return [
        {
            "iteration": step,
            "consumed_samples": batch * step,
            "loss": 3 / step,
            "ce_loss": 5 / step,
            "tau": 2 - 1 / step,
            "accept_rate": [0.5, 0.25, None],
            "grad_norm": 60 / step**2,
            "learning_rate": 1e-4,
            "tokens_per_second": 20_000 + step,
            "peak_memory_gib": step % 3,
            "skipped_steps": 0,
            "sampler/padding_share": 0.1 * step,
            **more,
        }
        for step in range(1, steps + 1)
    ]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def calibration():
    records = synthetic_records(
        prompts=4, rounds=30, temperatures=[2.0] * 3, checkpoint=None, iteration=STEPS
    )
    return calibrate(records, CalibrationSettings())


@pytest.fixture
def make_run(tmp_path):
    """Write the folder of a run that has only what is given: sections of its config, and files by
    name. Returns the folder."""

    def make(name, files=(), **sections):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        settings = tiny_settings(tmp_path / "target", tmp_path / "chats.jsonl", folder)
        config = tiny_config(settings, train={"iterations": STEPS}, **sections)
        (folder / "config.yaml").write_text(config.to_yaml())
        (folder / "run_status").write_text("completed\n")
        for file, content in dict(files).items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / file).write_text(text)
        return folder

    return make


def whole(calibration, **changes):
    heldout = [{**row, "tau": 1 + row["iteration"] / 10} for row in metrics()[::4]]
    return {
        "metrics.jsonl": lines(metrics()),
        "heldout.jsonl": lines(heldout),
        "evaluation.json": EVALUATION,
        "evaluation_untrained.json": UNTRAINED,
        "calibration.json": calibration,
        **changes,
    }


def report(*arguments):
    """The page of a run in its own place, or at --output."""
    arguments = [*map(str, arguments)]
    assert main(["report", *arguments]) == DONE
    page = arguments[-1] if "--output" in arguments else f"{arguments[0]}/report.html"
    with open(page, encoding="utf-8") as file:
        return Page(file.read())


def test_a_run_that_has_everything(make_run, calibration, capsys):
    folder = make_run("whole", whole(calibration))
    page = report(folder)
    assert capsys.readouterr().out == f"wrote {folder}/report.html\n", "nothing is missing"
    assert page.headings[:4] == [
        "Run whole",
        "Training",
        "Acceptance by slot, before and after training",
        "Calibration of the confidence head",
    ]
    assert "Not shown" not in page.text
    row = ["whole", "12", "1.917", "1.900", "2.500", "1.125", "0.750"]
    start = page.cells.index("whole")
    assert page.cells[start : start + 7] == row
    assert page.cells[start + 9] == "4 of 4"
    assert page.captions[:12] == [
        "tau, training",
        "accept rate by slot, training",
        "tau, held-out",
        "accept rate by slot, held-out",
        "loss",
        "ce term",
        "gradient norm",
        "learning rate",
        "tokens per second",
        "peak memory gib",  # no panel of its own, and it changes
        "decoded tau before and after",
        "accepted, of those reached",
    ]
    assert "calibration error by slot" in page.captions
    assert sum("reliability" in name for name in page.drawn()) == 2
    assert len(page.drawn()) == len(page.pictures), "each has something in it"


def test_runs_side_by_side(make_run, calibration, tmp_path):
    first = make_run("a/run", whole(calibration))
    settings = {"loss": {"terms": {"kl": 1.0}}, "optimizer": {"lr": 0.5}}
    second = make_run("b<i>$x$/run", {"metrics.jsonl": lines(metrics(steps=6))}, **settings)
    page = report(first, second, "--output", tmp_path / "page.html")
    assert page.headings[:2] == ["2 runs compared", "What differs in their settings"]
    names = ["a/run", "b<i>$x$/run"]
    assert page.legend[-2:] == names
    assert [cell for cell in page.cells if cell in names][:2] == names
    assert "6 of 12" in page.cells
    keys = [cell for cell in page.cells if cell.startswith(("loss.", "optimizer.", "train."))]
    assert keys == ["loss.terms.ce", "loss.terms.l1", "loss.terms.kl", "optimizer.lr"]
    assert "The objectives differ" in page.text and "The evaluations differ" not in page.text
    loss = next(p for p in page.pictures if p.get("aria-label") == "loss, by step")
    styles = " ".join(path.get("style", "") for path in loss.iter("path"))
    assert "--c-1f6fb4" in styles and "--c-d9822b" in styles, "a curve of each"
    assert "accept rate of slot 0, training" in page.captions


def test_runs_of_other_batches_are_drawn_by_samples(make_run):
    small, large, same = (
        read_run(make_run(name, {"metrics.jsonl": lines(metrics(batch=batch))}))
        for name, batch in (("small", 4), ("large", 8), ("same", 8))
    )
    assert Steps([small, large]).label == "samples"
    assert Steps([small, large]).curve(large.metrics, "loss")[0][0] == 8
    assert Steps([large, same]).label == "step"


def test_evaluations_that_do_not_compare_are_named(make_run, calibration):
    other = {**EVALUATION, "temperature": 1.0}
    runs = [
        read_run(make_run("a", whole(calibration))),
        read_run(make_run("b", whole(calibration, **{"evaluation.json": other}))),
    ]
    name_runs(runs)
    among, alone = cautions(runs)
    assert among.startswith("The evaluations differ in temperature, so")
    assert alone.startswith("The evaluations of b before and after training differ in temperature")


def test_what_is_missing_comes_with_the_command_that_makes_it(make_run, capsys):
    folder = make_run("bare")
    page = report(folder)
    said = capsys.readouterr().out
    for name in ("metrics.jsonl", "heldout.jsonl", "evaluation.json", "calibration.json"):
        assert f"bare: {name}" in said and name in page.text
    commands = [shlex.split(line) for code in page.code for line in code.splitlines()]
    assert [words[2] if words[1] == "-m" else words[1] for words in commands] == [
        *("dspark_megatron.train", "dspark_megatron.train"),
        *("dspark_megatron.evaluate", "dspark_megatron.evaluate", "dspark_megatron.evaluate"),
        "tools/calibrate_confidence.py",
    ]
    for words in commands:
        if words[1] == "-m":
            config = words[words.index("--config") + 1]
            overrides = [w.replace("STEPS", "5") for w in words if "=" in w]
            load_config(config, overrides, trains=False)


def test_a_line_that_a_kill_cut_short_is_left_out_and_said(make_run):
    text = lines(metrics()) + '{"iteration": 13, "lo'
    run = read_run(make_run("killed", {"metrics.jsonl": text}))
    assert "metrics.jsonl: line 13 left out (1 in all)" in run.notes[0].text
    assert run.metrics == metrics()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("evaluation.json", {"files": {}}, "evaluation.json left out: "),
        ("evaluation_untrained.json", "{", "evaluation_untrained.json left out: "),
        ("calibration.json", {}, "calibration.json left out: "),
        ("serving.json", {"figures": 1}, "serving.json left out: "),
        ("evaluation.json", EVALUATION | {"iteration": 8}, "of step 8, and the run is at 12"),
    ],
)
def test_a_file_that_cannot_be_shown_is_left_out_and_said(
    make_run, calibration, file, content, said
):
    run = read_run(make_run("odd", whole(calibration, **{file: content})))
    assert said in run.notes[0].text
    assert summary(run)["training tau"] == pytest.approx(2 - 1 / STEPS)


def test_a_long_run_has_a_small_page(make_run):
    rows = [{"iteration": step, "loss": step % 7} for step in range(1, 10 * MOST_POINTS)]
    folder = make_run("long", {"metrics.jsonl": lines(rows)})
    assert f"more than {MOST_POINTS} steps" in report(folder).text
    assert (folder / "report.html").stat().st_size < 50_000


def test_as_json_or_not_at_all(make_run, capsys):
    folder = make_run("a", {"metrics.jsonl": lines([{"iteration": 1, "loss": 2.5, "tau": 1.5}])})
    assert main(["report", str(folder), "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == f"{folder}/report.html"
    assert found["runs"][0]["training tau"] == 1.5
    assert "evaluation.json is missing" in found["runs"][0]["not_shown"]
    assert main(["report", str(folder), "--quiet"]) == DONE
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}", "{b}"], "--output is missing"),
        (["{a}/evaluation.json"], "--output is missing"),
        (["{a}", "{a}/.", "--output", "page.html"], "named twice: "),
        (["{a}/../nowhere"], "there is no folder"),
        (["{a}/empty"], "no run's folder"),
        (["{a}", "--output", "{b}"], "is a folder"),
        (["{a}", "{b}", "--output", "x.html", "--calibration", "c"], "belong to one run"),
        (["{a}", "--calibration", "{a}/config.yaml"], "not valid JSON"),
        (["{b}", "--calibration", "{a}/calibration.json"], "belongs to an evaluation"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(make_run, calibration, capsys, arguments, message):
    places = {"a": make_run("a", whole(calibration)), "b": make_run("b")}
    (places["a"] / "empty").mkdir()
    assert main(["report", *(word.format(**places) for word in arguments)]) == BAD_INPUT
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_damaged_config_is_one_sentence(make_run, capsys):
    folder = make_run("a")
    (folder / "config.yaml").write_text("model: {num_layer: 2}\n")
    assert main(["report", str(folder)]) == BAD_INPUT
    assert "num_layers" in capsys.readouterr().err and not (folder / "report.html").exists()
