"""`dspark report`: runs side by side on one page, what it says of files that are not there, and the
folders that it refuses."""

import json
import shlex
from pathlib import Path

import pytest

from dspark_megatron.cli.config_argument import given_config
from dspark_megatron.cli.exit_codes import BAD_INPUT, DONE
from dspark_megatron.cli.main import main, parser_of
from dspark_megatron.cli.train.evaluate import sort_arguments
from dspark_megatron.config.loading import load_config
from dspark_megatron.evaluation.confidence.calibration import CalibrationSettings, calibrate
from dspark_megatron.evaluation.pages.run_pages.comparison import cautions, summary
from dspark_megatron.evaluation.pages.run_pages.curves import MOST_POINTS, Steps
from dspark_megatron.evaluation.pages.run_pages.marks import MOST_MARKS
from dspark_megatron.evaluation.pages.run_pages.run_files import read_run
from dspark_megatron.evaluation.pages.run_pages.runs_page import name_runs
from support.dspark_lines import check_dspark
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
    row = ["whole", "12", "1.917", "1.900", "2.500", "1.125", "as trained", "0.750"]
    start = page.cells.index("whole")
    assert page.cells[start : start + 8] == row
    assert page.cells[start + 10] == "4 of 4"
    assert "spike" not in page.text and "skipped" not in page.text
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


def test_figures_of_the_moving_average_are_told_apart(make_run, calibration):
    average = {**EVALUATION, "checkpoint": "run/checkpoints/iter_12", "weights": "ema"}
    trained = {**average, "weights": "trained"}
    settings = {"optimizer": {"ema_decay": 0.9}, "evaluate": {"weights": "ema"}}
    a, b, c = runs = [
        read_run(make_run("a", whole(calibration, **{"evaluation.json": average}), **settings)),
        read_run(make_run("b", whole(calibration, **{"evaluation.json": average}))),
        read_run(make_run("c", whole(calibration, **{"evaluation.json": trained}))),
    ]
    name_runs(runs)
    weights = [summary(run)["evaluated weights"] for run in runs]
    assert weights == ["moving average", "moving average", "as trained"]
    assert cautions([a]) == cautions([c]) == [], "the untrained draft compares with both"
    among_decoded, among_heldout, within = cautions(runs)
    assert among_decoded.startswith("Decoded figures of a, b are of the moving average")
    assert among_heldout.startswith("Held-out figures of a are of the moving average")
    assert within.startswith("Of b, decoded figures are of the moving average")
    assert "evaluate.weights=ema" in b.commands.evaluate()


def test_spikes_and_skipped_steps_are_marked(make_run, tmp_path, capsys):
    keys = ("iteration", "consumed_samples", "loss", "ce_loss", "grad_norm")
    calm = [{key: row[key] for key in keys} for row in metrics()]
    rows = [{**row, "skipped_steps": 1} for row in calm]
    rows[4]["spike"], rows[7]["spike"] = ["loss", "grad_norm"], ["loss"]
    skipped = [{"iteration": 7, "consumed_samples": 28, "reason": "not finite", "samples": []}]
    files = {"metrics.jsonl": lines(rows), "skipped_samples.jsonl": lines(skipped)}
    folder, other = make_run("odd", files), make_run("calm", {"metrics.jsonl": lines(calm)})
    page = report(folder)
    assert "skipped_samples" not in capsys.readouterr().out
    assert "2 spikes, 1 skipped step." in page.text
    assert "loss (2 spikes, 1 skipped step)" in page.captions
    assert "gradient norm (1 spike, 1 skipped step)" in page.captions
    assert "ce term" in page.captions
    assert lines_down(page, "loss") == 3 and lines_down(page, "ce term") == 0
    both = report(other, folder, "--output", tmp_path / "page.html")
    assert "odd: 2 spikes, 1 skipped step." in both.text and "calm: 2" not in both.text
    assert lines_down(both, "loss") == 3


def lines_down(page, name):
    """Vertical lines from top to bottom of a picture, but for its axes."""
    picture = next(p for p in page.pictures if p.get("aria-label").startswith(name))
    paths = [path for path in picture.iter("path") if "opacity: 0.7" in path.get("style", "")]
    return len(paths)


def test_many_spikes_are_counted_and_few_drawn(make_run):
    rows = [{"iteration": i, "loss": i % 7, "spike": ["loss"]} for i in range(1, 5000)]
    page = report(make_run("wild", {"metrics.jsonl": lines(rows)}))
    assert "loss (4,999 spikes)" in page.captions
    assert 50 < lines_down(page, "loss") <= MOST_MARKS + 1


def test_skipped_steps_that_no_file_names_are_said(make_run):
    run = read_run(make_run("a", {"metrics.jsonl": lines(metrics(skipped_steps=3))}))
    assert "has 0 of the 3 steps that were skipped" in run.notes[0].text


def test_what_is_missing_comes_with_the_command_that_makes_it(make_run, capsys):
    folder = make_run("bare")
    page = report(folder)
    said = capsys.readouterr().out
    for name in ("metrics.jsonl", "heldout.jsonl", "evaluation.json", "calibration.json"):
        assert f"bare: {name}" in said and name in page.text
    commands = [shlex.split(line) for code in page.code for line in code.splitlines()]
    assert [words[1] for words in commands] == [*["train"] * 2, *["evaluate"] * 3, "calibrate"]
    check_commands(commands)


def check_commands(commands):
    """Each is one that `dspark` takes, with settings that can be; returns the configs of those that
    have one."""
    configs = []
    for words in commands:
        check_dspark(words)
        args = parser_of(words[1]).parse_intermixed_args(words[2:])
        if words[1] == "calibrate":
            continue
        (given_config if words[1] == "train" else sort_arguments)(args)
        assert Path(args.config).exists()
        overrides = [word.replace("STEPS", "5") for word in args.overrides]
        configs.append(load_config(args.config, overrides, trains=words[1] == "train"))
    return configs


@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": {"ema_decay": 0.9}, "evaluate": {"weights": "ema", "output": "there.json"}},
        {"evaluate": {"best": True, "prompt_files": ["prompts.jsonl"]}},
        {"evaluate": {"checkpoint": "runs/other"}},
        {"target": {"provider": "cache", "cache": "states"}},
        {"target": {"provider": "cache", "cache": "states", "checkpoint": "megatron"}},
        {},
    ],
    ids=["average", "best", "checkpoint", "stored", "stored_of_megatron", "moved"],
)
def test_commands_fit_the_settings_of_the_run(make_run, sections):
    folder = make_run("run", {"run_status": "stopped\n"}, **sections)
    if not sections:
        folder = folder.rename(folder.with_name("moved"))
        (folder / "checkpoints").mkdir()
    lines = [line for note in read_run(folder).notes for line in note.command.splitlines()]
    configs = check_commands(map(shlex.split, lines))
    assert {Path(config.train.output_dir).resolve() for config in configs} == {folder.resolve()}
    _, heldout, trained, untrained, records = configs
    assert heldout.evaluate.every == 5 and not heldout.target.is_stored
    assert trained.evaluate.records == records.evaluate.records == f"{folder}/drafts.safetensors"
    assert untrained.evaluate.output == f"{folder}/evaluation_untrained.json"
    assert untrained.evaluate.untrained and not trained.evaluate.untrained
    assert trained.evaluate.output in ("", f"{folder}/evaluation.json")
    assert not trained.target.is_stored


def test_a_completed_run_is_not_trained_in_its_folder(make_run):
    run = read_run(make_run("run"))
    assert "train.output_dir=NEW_RUN" in run.notes[0].command


def test_held_out_figures_that_cannot_be_have_no_command(make_run):
    loss = {"terms": {"ce": 1.0, "l1": 0.0}, "confidence_head_alpha": 0.0}
    notes = read_run(make_run("run", loss=loss)).notes
    (heldout,) = [note for note in notes if "heldout.jsonl" in note.text]
    assert "cross entropy alone" in heldout.text and not heldout.command


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
