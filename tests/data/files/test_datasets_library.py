"""Entries that the library `datasets` reads: the samples of the same lines, splits, refusals."""

import os

import datasets
import pytest

from dspark_megatron.data.dataset import load_samples
from dspark_megatron.data.files import datasets_library
from dspark_megatron.data.files.datasets_library import Entry
from dspark_megatron.data.files.jsonl import parse_line
from dspark_megatron.data.files.reading import read_lines
from dspark_megatron.data.files.sources import check_apart, find_files
from dspark_megatron.data.prompts.chat_prompts import read_prompts
from dspark_megatron.errors import ConfigError
from support.chat_lines import chat, tokens, write_jsonl
from support.hostile import refused
from support.samples import VOCAB_SIZE, sample_rules
from support.tables import write_parquet
from support.tiny_tokenizer import tiny_tokenizer

RECORDS = [chat("hi", text) for text in ("hello", "all", "the hill", "in", "the inn")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"n": 3}}}
MIXED = [
    {"messages": [RECORDS[0]["messages"][0], {"role": "assistant", "tool_calls": [CALL]}]},
    {"messages": [RECORDS[0]["messages"][0], {"role": "assistant", "content": [{"a": "hello"}]}]},
]
"""Objects whose keys hold things of different types, which the library keeps as JSON text."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The library's cache, empty, and no network."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets_library._open_remote.cache_clear()
    return cache


@pytest.fixture
def folder(tmp_path):
    """A folder that `load_dataset` understands, with two splits."""
    folder = tmp_path / "raw"
    folder.mkdir()
    write_parquet(folder / "train.parquet", RECORDS)
    write_parquet(folder / "test.parquet", RECORDS[:1])
    return folder


@pytest.fixture
def on_hub(folder, cache):
    """The same as a data set OWNER/NAME of the Hub that was downloaded before."""
    find_files(f"hf:{folder}:train")
    [built] = (path for path in cache.glob("raw/default/0.0.0/*") if path.is_dir())
    for file in built.glob("raw-*"):
        file.rename(file.with_name(file.name.replace("raw-", "name-")))
    (cache / "raw").rename(cache / "owner___name")
    return built.name


def load(*entries, **rules):
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    return load_samples(list(entries), tokenizer, VOCAB_SIZE, sample_rules(64, 1, **rules))


def records_of(entry):
    [file] = find_files(entry)
    return [parse_line(line) for _, line in read_lines(file)]


def saved(path, records, **options):
    datasets.Dataset.from_list(records, on_mixed_types="use_json").save_to_disk(path, **options)
    return path


# What an entry means


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("hf:owner/name", Entry("owner/name")),
        ("hf:owner/name:train", Entry("owner/name", split="train")),
        ("hf:owner/name:main:test", Entry("owner/name", None, "main", "test")),
        ("hf:owner/name@v1.0:train[:128]", Entry("owner/name", "v1.0", None, "train[:128]")),
        ("hf:o/n:en:train[1:9]+test[:5%]", Entry("o/n", None, "en", "train[1:9]+test[:5%]")),
        ("hf:./a b@c:train", Entry("./a b@c", split="train")),
        ("hf:/data/x", Entry("/data/x")),
        ("hf:~/x", Entry(os.path.expanduser("~/x"))),
    ],
)
def test_an_entry_is_name_revision_configuration_and_split(text, entry):
    assert Entry.parse(text) == entry


@pytest.mark.parametrize(
    "rest",
    [*("", ":", "json", "name", "owner/name:", "a/b:c:d:e", "a/b/c", "a b/c", "//datasets/a/b")]
    + ["a/b@", "a/b@:train", "a/b::train", "https://huggingface.co/datasets/a/b"],
)
def test_entries_of_another_form(rest):
    refused(lambda: find_files(f"hf:{rest}"), "must have the form hf:NAME[@REVISION][:CONFIG")


# What is read


def test_a_folder_and_its_splits(tmp_path, folder):
    expected = load(write_jsonl(tmp_path / "lines.jsonl", RECORDS))
    assert load(f"hf:{folder}:train").fingerprint == expected.fingerprint
    assert records_of(f"hf:{folder}:train[1:3]") == RECORDS[1:3]
    assert records_of(f"hf:{folder}:test+train[-1:]") == [RECORDS[0], RECORDS[-1]]
    assert records_of(f"hf:{folder}:default:train[:40%]") == RECORDS[:2]


def test_a_name_of_the_hub_is_taken_from_the_cache_without_a_network(tmp_path, on_hub):
    expected = load(write_jsonl(tmp_path / "lines.jsonl", RECORDS))
    found = load("hf:owner/name:train")
    assert found.fingerprint == expected.fingerprint
    assert found.origins[1] == (find_files("hf:owner/name:train")[0].path, 2)
    assert records_of(f"hf:owner/name@{on_hub}:default:test") == RECORDS[:1]
    wanted = f"asks for a revision, the Hub cannot be reached, and the cache has {on_hub}"
    refused(lambda: find_files("hf:owner/name@v2:train"), wanted)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_of_save_to_disk_is_an_entry_as_it_is(tmp_path, shards):
    path = saved(tmp_path / "saved", RECORDS * 20, num_shards=shards)
    expected = load(write_jsonl(tmp_path / "lines.jsonl", RECORDS * 20))
    assert load(path).fingerprint == load(f"{path.parent}/s*d").fingerprint == expected.fingerprint
    assert records_of(f"hf:{path}:train[98:]") == RECORDS[-2:]


def test_several_splits_of_save_to_disk_must_be_named(tmp_path):
    rows = datasets.Dataset.from_list(RECORDS)
    path = tmp_path / "saved"
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(path)
    message = refused(lambda: find_files(path), "has the splits train (5 rows), test (1 rows); ")
    assert message.endswith(f"name one: hf:{path}:train")
    assert records_of(f"hf:{path}:test") == RECORDS[:1]


def test_objects_that_the_library_keeps_as_text_are_objects_again(tmp_path):
    assert records_of(saved(tmp_path / "saved", MIXED)) == MIXED


def test_rows_that_were_shuffled_keep_their_new_order(tmp_path):
    rows = datasets.Dataset.from_list(RECORDS).select([4, 0, 2])
    rows.save_to_disk(tmp_path / "saved")
    assert records_of(tmp_path / "saved") == [RECORDS[i] for i in (4, 0, 2)]


def test_prompts_may_be_of_the_library(folder):
    assert [
        p.record["messages"][0]["content"] for p in read_prompts(f"hf:{folder}:test", None)
    ] == ["hi"]


# What tells rows from others


def test_an_identity_changes_with_what_is_read(tmp_path, folder):
    def identity(entry):
        [file] = find_files(entry)
        return file.identity()

    assert identity(f"hf:{folder}:train") == identity(f"hf:{folder}:default:train")
    assert identity(f"hf:{folder}:train") != identity(f"hf:{folder}:train[:3]")
    before = identity(f"hf:{folder}:train")
    write_parquet(folder / "train.parquet", RECORDS[:2])
    assert identity(f"hf:{folder}:train") != before
    path = saved(tmp_path / "saved", RECORDS)
    before = identity(path)
    assert identity(path) == before
    os.utime(path / "data-00000-of-00001.arrow", ns=(1, 1))
    assert identity(path) != before


def test_rows_are_not_held_out_and_trained_on(tmp_path, folder):
    train = f"hf:{folder}:train"
    check_apart([f"{train}[:3]"], [f"{train}[3:]", f"hf:{folder}:test"])
    message = refused(lambda: check_apart([train], [f"hf:{folder}:default:train[3:]"]), "held")
    assert ":default:train[3:] is in data.train_files" in message
    path = saved(tmp_path / "saved", RECORDS)
    refused(lambda: check_apart([str(path)], [f"hf:{path.parent}/../{path.parent.name}/saved"]), "")


def test_a_file_is_not_held_out_beside_the_split_that_has_it(tmp_path, folder):
    train, test = f"hf:{folder}:train[:3]", str(folder / "test.parquet")
    check_apart([train], [test])
    check_apart([test], [train])
    link = tmp_path / "link"
    link.symlink_to(folder / "train.parquet")
    refused(lambda: check_apart([train], [str(link)]), f"{link} is in data.train_files")
    refused(lambda: check_apart([str(link)], [train]), f"{train} is in data.train_files")
    path = saved(tmp_path / "saved", RECORDS)
    [arrow] = path.glob("*.arrow")
    refused(lambda: check_apart([str(path)], [str(arrow)]), f"{arrow} is in data.train_files")


# What is refused


@pytest.mark.parametrize(
    ("split", "fragment"),
    [
        ("", "has the splits train (5 rows), test (1 rows); name one: hf:"),
        (":valid", "Should be one of ['train', 'test'] (its splits: train (5 rows), test (1 r"),
        (":train[x]", "Unrecognized instruction format: train[x]"),
        (":train[4:2]", "has no rows; it has train (5 rows), test (1 rows)"),
        (":other:train", "BuilderConfig 'other' not found. Available: ['default']"),
    ],
)
def test_splits_and_configurations_that_are_not_there(folder, split, fragment):
    assert f"hf:{folder}{split}" in refused(lambda: find_files(f"hf:{folder}{split}"), fragment)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    message = refused(lambda: find_files("hf:owner/name:train"), "the Hub cannot be reached (")
    assert "hf:owner/name:train is not in the cache" in message and "set HF_HOME" in message
    refused(lambda: find_files(f"hf:{tmp_path}/none"), "there is no such folder")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    refused(lambda: find_files(f"hf:{tmp_path}/owner"), "cannot load hf:")
    monkeypatch.chdir(tmp_path)
    refused(lambda: find_files("hf:owner/name"), "write hf:./owner/name if it is meant")


def test_folders_of_code_and_of_other_data_are_refused_unread(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "code.py").write_text("raise SystemExit('run')")
    refused(lambda: find_files(f"hf:{code}"), "cannot load hf:")
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"")
    refused(lambda: find_files(f"hf:{images}"), "of the form imagefolder, and tables of texts are")


def test_columns_and_rows_are_checked_as_in_files(tmp_path):
    refused(lambda: load(saved(tmp_path / "a", [{"text": "a"}])), "and has text; rename the one")
    path = saved(tmp_path / "b", [tokens([5, 6], [1, 1]), tokens([5, 999], [1, 1])])
    refused(lambda: load(path), f"{path}:2: token ids [999] are outside")
    assert len(load(path, skip_bad_lines=0.5)) == 1


@pytest.mark.parametrize("left", [0, 7, 400, -1, -8])
def test_a_saved_file_that_was_cut_short(tmp_path, left):
    path = saved(tmp_path / "saved", RECORDS)
    file = path / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ConfigError, match="cannot read the data set|is damaged or cut short"):
        load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"_data_files": [{"filename": "../x"}]}'])
def test_a_saved_state_that_lies(tmp_path, content):
    path = saved(tmp_path / "saved", RECORDS)
    (path / "state.json").write_text(content)
    assert str(path) in refused(lambda: load(path), "cannot read the data set")


def test_without_the_package_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused(lambda: find_files(f"hf:{folder}:train"), "install it: pip install pyarrow datasets")


def test_an_old_library_that_would_run_code_is_refused(folder, monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    refused(lambda: find_files(f"hf:{folder}:train"), "needs datasets 4 or newer")
