"""The numbers of docs/tour.md are those of the code."""

import re

import pytest
import torch

from dspark_megatron.data.blocks import anchor_seed, sample_anchors
from support.paths import ROOT
from support.reference import plain_blocks, plain_candidates
from support.tiny_target import tiny_config
from support.training_runs import curve, run_training

PAGE = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
LINE = next(line for line in PAGE.splitlines() if line.startswith('{"messages"'))


@pytest.fixture(scope="module")
def walk(pool, tiny_run, tmp_path_factory):
    """The line of the tour as the only one of a run of two steps."""
    folder = tmp_path_factory.mktemp("tour")
    chats = folder / "chats.jsonl"
    chats.write_text(LINE + "\n", encoding="utf-8")
    train = {"output_dir": str(folder / "run"), "iterations": 2, "global_batch_size": 1}
    train["tensorboard"] = False
    config = tiny_config(tiny_run, data={"train_files": [str(chats)]}, train=train)
    (sample,) = pool.run(read_sample, world=1, tp=1, config=config)
    pool.run(run_training, world=1, tp=1, config=config)
    return *map(torch.tensor, sample), curve(folder / "run")


def read_sample(runtime, config):
    from dspark_megatron.run.check import check
    from dspark_megatron.run.data import load_run_data

    plan = check(config, 1)
    return [part.tolist() for part in load_run_data(plan, config.data.train_files)[0]]


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def test_tokens_and_loss_mask(walk):
    ids, mask, _ = walk
    assert f"`s` = {len(ids)} tokens" in PAGE and f"{int(mask.sum())} tokens, from" in PAGE
    rows = {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"(?m)^\| (position|id|loss mask) \| (.+) \|$", PAGE)
    }
    shown = [
        (int(position), int(token), int(learnt))
        for position, token, learnt in zip(*rows.values(), strict=True)
        if token
    ]
    assert len(shown) == 10
    assert shown == [(p, int(ids[p]), int(mask[p])) for p, _, _ in shown]


def test_anchors_and_blocks(walk):
    ids, mask, _ = walk
    candidates = plain_candidates(mask)
    assert f"There are {len(candidates)} ({candidates[0]} to {candidates[-1]})" in PAGE
    anchors = numbers(re.search(r"It gives ([\d, and]+)\.", PAGE)[1])
    assert anchors == sample_anchors(mask, 6, anchor_seed(1234, 0, 0)).tolist()
    blocks = plain_blocks(ids, mask, torch.tensor(anchors), 3)
    supervised = int(blocks.eval_mask.sum())
    weight = float((blocks.eval_mask * torch.exp(torch.arange(3) / -4)).sum())
    assert f"(sum {weight:.3f})" in PAGE
    assert f"`n` = {len(anchors)} blocks have {supervised} supervised slots" in PAGE
    assert f"the {supervised} supervised slots alone" in PAGE


def test_figures_of_two_steps(walk):
    first, second = walk[2]
    terms = (f"{first[name]:.3f}" for name in ("ce_loss", "l1_loss", "confidence_loss", "loss"))
    assert "0.1 * {} (CE) + 0.9 * {} (L1) + 1.0 * {} (confidence) = {}".format(*terms) in PAGE
    assert f"tau  = {first['tau']:.3f}" in PAGE
    assert f"The norm is {first['grad_norm']:.3f}" in PAGE
    assert f"loss {second['loss']:.3f} and tau {second['tau']:.3f}" in PAGE
