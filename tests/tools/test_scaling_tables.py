"""tools/scaling_tables.py on a tiny target."""

import re

import pytest
import scaling_tables

from support.tiny_target import make_target

pytestmark = pytest.mark.slow

KEYS = ["model.target_layer_ids=[0,2]", "model.mask_token_id=3", "model.num_layers=1"]
SMALL = ["--nodes", "1", "--gpus-per-node", "2", "--at-nodes", "1", "--grow-nodes", "1", "2"]
SIZES = ["--lengths", "32", "64", "--anchors", "4", "--gpu-memory-gib", "1"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(make_target(tmp_path_factory.mktemp("target") / "tiny"))


def arguments(target, *more):
    sizes = ["data.max_length=48", "train.global_batch_size=8", "model.num_anchors=4"]
    return ["--targets", target, "--grow", target, *SMALL, *SIZES, *more, *KEYS, *sizes]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_take_the_place_of_the_page_s_old_ones(target, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    for _ in range(2):
        scaling_tables.main(arguments(target, "--page", str(page)))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert len(re.findall("(?m)^### ", text)) == 4
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == [
        *("target", "tiny", "nodes", "1", "2", "data.max_length", "32", "64"),
        *("model.num_anchors", "4"),
    ]
    for name, row in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert len(name) == len(row) and "TP" in row[name.index("layout")]


def test_a_row_says_what_does_not_fit(target, capsys):
    scaling_tables.main(arguments(target, "--gpu-memory-gib", "0.000001"))
    assert "no layout fits 1 node(s) of 2 GPUs: the leanest" in capsys.readouterr().out


def test_a_page_without_marks_is_refused_before_any_work(target, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="must have <!-- tables -->"):
        scaling_tables.main(arguments(target, "--page", str(page)))
    assert page.read_text() == "nothing" and "tiny" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--mfu", "0"], r"mfu \(0\), the share"),
        (["--nodes=0"], r"nodes \(0\) must be >= 1"),
        (["model.nonsense=1"], "nonsense"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(target, options, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        scaling_tables.main(arguments(target, *options))
