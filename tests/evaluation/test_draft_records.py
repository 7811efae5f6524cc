"""Records of drafts survive their file, and other files are refused."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.draft_records import DraftRecords, check_same_draft


def records(**changes):
    values = dict(
        confidence_logits=torch.tensor([[1.0, -1.0], [0.5, 0.0], [2.0, 3.0]]),
        accept_rate=torch.tensor([[0.9, 0.2], [0.4, float("nan")], [1.0, 0.8]]),
        proposed=torch.tensor([2, 1, 2]),
        accepted=torch.tensor([0, 1, 2]),
        prompt=torch.tensor([0, 0, 3]),
        facts={"block_size": 2, "iteration": 7},
    )
    return DraftRecords(**{**values, **changes})


def test_a_round_trip(tmp_path):
    before = records()
    before.save(tmp_path / "drafts.safetensors")
    after = DraftRecords.load(tmp_path / "drafts.safetensors")
    assert after.facts == before.facts and len(after) == 3
    for field in dataclasses.fields(before):
        if field.name != "facts":
            mine, theirs = getattr(before, field.name), getattr(after, field.name)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_what_is_known_of_a_slot():
    assert records().judged().tolist() == [[True, True], [True, False], [True, True]]
    assert records().survived().tolist() == [[False, False], [True, False], [True, True]]
    assert records().select(torch.tensor([2])).prompt.tolist() == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accepted": torch.tensor([0, 2, 2])}, "accepted <= proposed"),
        ({"proposed": torch.tensor([2, 1, 3])}, "proposed <= 2"),
        ({"prompt": torch.tensor([0, 0, 3], dtype=torch.int32)}, "prompt"),
        ({"accept_rate": torch.zeros(3, 5)}, "accept_rate"),
        ({"facts": None}, "facts"),
    ],
)
def test_damaged_records_are_refused(tmp_path, changes, message):
    records(**changes).save(tmp_path / "drafts.safetensors")
    with pytest.raises(ConfigError, match=message):
        DraftRecords.load(tmp_path / "drafts.safetensors")


def test_other_files_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "text.txt").write_text("hello")
    empty = records().select(torch.tensor([], dtype=torch.int64))
    empty.save(tmp_path / "empty.safetensors")
    for name in ("model.safetensors", "text.txt", "missing", "empty.safetensors"):
        with pytest.raises(ConfigError, match=name):
            DraftRecords.load(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({}, None),
        ({"checkpoint": "archive/y/checkpoints/iter_0000007"}, None),
        ({"checkpoint_digest": "b"}, ("checkpoint_digest", "b", "a")),
        ({"checkpoint": "z", "checkpoint_digest": None}, ("checkpoint", "z", "runs/x/i")),
        ({"checkpoint": None}, ("checkpoint", None, "runs/x/i")),
        ({"iteration": 8}, ("iteration", 8, 7)),
    ],
)
def test_a_draft_is_known_by_the_digest_of_its_checkpoint(changes, different):
    """Under whatever name; by its name where an older version wrote no digest."""
    facts = {"target": "t", "checkpoint": "runs/x/i", "iteration": 7, "block_size": 2}
    facts |= {"checkpoint_digest": "a"}

    def said(*of):
        return repr(of)

    if different is None:
        check_same_draft(facts | changes, facts, said)
        return
    with pytest.raises(ConfigError) as error:
        check_same_draft(facts | changes, facts, said)
    assert str(error.value) == repr(different)
