"""Where samples come from: files, folders, globs, Megatron indexed datasets, in given shares."""

from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch

from dspark_megatron.data.dataset import load_samples
from dspark_megatron.data.files.sources import check_apart, find_files
from dspark_megatron.data.sampler import Blend, SampleRef, StepSampler, global_batch, share_out
from dspark_megatron.errors import ConfigError
from support.chat_lines import read_rows, talk, tokens, write_jsonl
from support.samples import FORGETTING_TEMPLATE, VOCAB_SIZE, sample_rules
from support.tables import write_parquet
from support.tiny_target import tiny_config
from support.tiny_tokenizer import tiny_tokenizer
from support.training_runs import assert_same_curve, curve, run_training

RULES = sample_rules(8, 1)


def write_ids(path, first, count):
    """Samples whose ids say where they come from."""
    return write_jsonl(path, [tokens([first + i] * 2, [1, 1]) for i in range(count)])


def write_indexed(prefix, documents, dtype=numpy.uint16):
    """documents: lists of sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def load():
    """Entries to the ids of their samples."""
    from dspark_megatron.run.indexed_dataset import read_indexed

    def load(*entries, rules=RULES, weights=None):
        return load_samples(
            list(map(str, entries)),
            tiny_tokenizer(VOCAB_SIZE),
            VOCAB_SIZE,
            rules,
            weights=weights,
            read_indexed=read_indexed,
        )

    return load


def ids(dataset):
    return [sample.input_ids.tolist() for sample in dataset]


# Files


def test_a_folder_and_a_glob_give_their_files_by_name(tmp_path, load):
    for name, first in (("b", 20), ("a", 10)):
        write_ids(tmp_path / f"{name}.jsonl", first, 1)
    write_indexed(tmp_path / "c", [[[30]]])
    (tmp_path / "README.md").write_text("no data")
    found = [(file.path.name, file.indexed) for file in find_files(tmp_path)]
    assert found == [("a.jsonl", False), ("b.jsonl", False), ("c", True)]
    assert ids(load(f"{tmp_path}/[ab].jsonl", tmp_path / "a.jsonl")) == [
        [10] * 2,
        [20] * 2,
        [10] * 2,
    ]
    assert find_files(f"{tmp_path}/c.*") == find_files(tmp_path / "c")
    assert find_files(f"{tmp_path.parent}/{tmp_path.name[:-1]}?") == find_files(tmp_path)


def test_entries_without_data_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match="data file .*none.jsonl must exist: a JSONL or Parquet file"
    ):
        find_files(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="data file .*/x\\*.jsonl must exist"):
        find_files(f"{tmp_path}/x*.jsonl")
    with pytest.raises(ConfigError, match=r"must hold \*.jsonl, .*, \*.parquet files"):
        find_files(tmp_path)
    (tmp_path / "lone.idx").touch()
    with pytest.raises(ConfigError, match="lacks .*lone.bin"):
        find_files(tmp_path)


def test_a_file_is_not_held_out_and_trained_on_by_another_name(tmp_path):
    write_ids(tmp_path / "a.jsonl", 1, 1)
    with pytest.raises(ConfigError, match="must not be trained on, and .*a.jsonl"):
        check_apart([str(tmp_path)], [f"{tmp_path}/../{tmp_path.name}/a.jsonl"])
    write_ids(tmp_path / "b", 1, 1)
    check_apart([str(tmp_path)], [str(tmp_path / "b")])


# Megatron indexed datasets


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32])
def test_a_document_is_a_sample_and_all_of_it_is_learnt(tmp_path, load, dtype):
    prefix = write_indexed(tmp_path / "docs", [[[1, 2], [3]], [[4] * 9], []], dtype)
    dataset = load(prefix, rules=sample_rules(5, 2))
    assert ids(dataset) == [[1, 2, 3], [4] * 5]
    assert all(sample.loss_mask.all() for sample in dataset)
    report = dataset.report
    assert (report.read, report.truncated, report.too_few_loss_tokens) == (3, 1, 1)
    assert ids(load(f"{prefix}.idx")) == ids(load(f"{prefix}.bin")) == ids(load(prefix))[:2]


def test_indexed_datasets_that_cannot_be_used(tmp_path, load):
    foreign = write_indexed(tmp_path / "foreign", [[[1]], [[2, 320]]])
    with pytest.raises(ConfigError, match=r"foreign:1: token ids \[320\] are outside"):
        load(foreign)
    floats = write_indexed(tmp_path / "floats", [[[1.0]]], numpy.float32)
    with pytest.raises(ConfigError, match="must hold token ids and holds float32"):
        load(floats)
    short = write_indexed(tmp_path / "short", [[[1, 2, 3]]])
    (tmp_path / "short.bin").write_bytes(b"1234")
    with pytest.raises(ConfigError, match="must have the 6 bytes .* has 4"):
        load(short)
    (tmp_path / "short.idx").write_bytes(b"no index at all")
    with pytest.raises(ConfigError, match="short.idx is no index"):
        load(short)


# Shares


def drawn(blend, num_samples, epochs):
    """The samples of each epoch, in their order."""
    refs = global_batch(0, epochs * num_samples, num_samples, seed=3)
    samples = [blend(ref) for ref in refs]
    return [samples[i * num_samples : (i + 1) * num_samples] for i in range(epochs)]


def test_shares_are_kept_in_every_epoch_and_samples_come_in_turn():
    shares = share_out(["a", "b"], [10, 30], [3.0, 1.0])
    assert shares.places == (30, 10)
    blend, seen = Blend(shares, seed=3), Counter()
    for epoch in drawn(blend, 40, epochs=3):
        assert sum(ref.sample_index < 10 for ref in epoch) == 30
        seen.update(epoch)
    places = [blend(SampleRef(0, place)) for place in range(30)]
    orders = {tuple(r.sample_index for r in places if r.epoch == passed) for passed in range(3)}
    assert len(orders) == 3, "each pass has an order of its own"
    assert max(seen.values()) == 1, "one use of a sample never comes twice"
    uses = Counter(ref.sample_index for ref in seen)
    assert {uses[i] for i in range(10)} == {9} and {uses[i] for i in range(10, 40)} == {1}
    assert {ref.epoch for ref in seen if ref.sample_index < 10} == set(range(9))


def test_shares_are_rounded_so_that_no_place_is_left_over():
    assert share_out(["a", "b", "c"], [3, 3, 4], [1.0, 1.0, 1.0]).places == (4, 3, 3)
    with pytest.raises(ConfigError, match="b has 2 samples and data.weights 0.01 gives it 0 of"):
        share_out(["a", "b"], [3, 2], [1.0, 0.01])
    with pytest.raises(ConfigError, match="b has 0 samples"):
        share_out(["a", "b"], [3, 0], [1.0, 1.0])


def test_the_report_counts_split_chats_and_hidden_reasoning(tmp_path):
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = FORGETTING_TEMPLATE
    chats = [talk("hi", "<think>hm</think>hello", "and", "bye"), talk("hi", "all")]
    path = write_jsonl(tmp_path / "chats.jsonl", chats)
    rules = sample_rules(99, 1, reasoning_tags=("<think>", "</think>"))
    report = load_samples([path], tokenizer, VOCAB_SIZE, rules).report
    hidden = len(tokenizer("<think>hm</think>").input_ids)
    assert (report.kept, report.split_chats, report.reasoning_tokens) == (3, 1, hidden)
    assert report.describe().endswith(
        f"; 1 chats were split by turns; {hidden} tokens of reasoning are not learnt"
    )


def test_every_layout_and_a_resumed_run_draw_the_same():
    shares, size = share_out(["a", "b"], [5, 6], [2.0, 1.0]), 8
    whole = [ref for epoch in drawn(Blend(shares, 3), 11, epochs=4) for ref in epoch]
    for dp_size in (1, 2):
        for consumed in (0, 24, 8):  # a step crosses the end of an epoch; in any order
            step = [None] * size
            for rank in range(dp_size):
                sampler = StepSampler(11, 3, size, 2, rank, dp_size, Blend(shares, 3))
                for j, batch in enumerate(sampler.micro_batches(consumed)):
                    place = (j * dp_size + rank) * 2
                    step[place : place + 2] = batch
            assert step == whole[consumed : consumed + size]
    assert [ref for epoch in drawn(Blend(shares, 4), 11, epochs=4) for ref in epoch] != whole


def test_weights_are_part_of_the_data(tmp_path, load):
    files = [write_ids(tmp_path / "a", 10, 2), write_ids(tmp_path / "b", 20, 4)]
    plain, even, other = (load(*files, weights=w) for w in (None, [1, 1], [1, 2]))
    assert plain.shares is None and even.shares.places == (3, 3)
    assert ids(plain) == ids(even) == ids(other)
    assert len({data.fingerprint for data in (plain, even, other)}) == 3


def test_a_weighted_run_of_several_forms_is_the_same_in_every_layout_and_from_a_table(
    pool, tiny_run, tmp_path
):
    documents = [[[40 + i, *range(50, 60)]] for i in range(4)]
    indexed = write_indexed(tmp_path / "docs", documents, numpy.int32)
    [lines] = tiny_run["data"]["train_files"]
    table = write_parquet(tmp_path / "same.parquet", read_rows(Path(lines)))
    curves = []
    for world, file in ((1, lines), (2, table)):
        data = {"train_files": [str(file), str(indexed)], "weights": [1.0, 3.0]}
        output = {"output_dir": str(tmp_path / str(world)), "iterations": 3}
        pool.run(
            run_training, world=world, tp=1, config=tiny_config(tiny_run, data=data, train=output)
        )
        curves.append(curve(tmp_path / str(world)))
    assert_same_curve(*curves)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [0.0], [-1.0]])
def test_a_weight_for_each_entry(tiny_run, weights):
    with pytest.raises(ConfigError, match="data.weights .* a number > 0 for each of the 1 entries"):
        tiny_config(tiny_run, data={"weights": weights})


def test_settings_of_reasoning(tiny_run):
    with pytest.raises(ConfigError, match="data.reasoning .'masked'.*did you mean 'mask'"):
        tiny_config(tiny_run, data={"reasoning": "masked"})
    with pytest.raises(ConfigError, match="must be two texts"):
        tiny_config(tiny_run, data={"reasoning_tags": ["<think>"]})
