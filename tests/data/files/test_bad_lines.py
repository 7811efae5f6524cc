"""Lines and files that cannot be used: listed by reason, left out by choice, told what they are."""

import bz2
import gzip
import json
import lzma
import secrets
import sys

import pyarrow
import pytest

from dspark_megatron.data.dataset import load_samples
from dspark_megatron.data.files.sources import find_files
from dspark_megatron.errors import ConfigError
from support.chat_lines import chat, tokens
from support.samples import VOCAB_SIZE, sample_rules
from support.tiny_target import tiny_config
from support.tiny_tokenizer import tiny_tokenizer

GOOD = chat("hi", "hello")


def zstandard(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.fixture
def load(tmp_path):
    """Lines (objects, or bytes as they are) to a dataset."""

    def load(lines, name="train.jsonl", pack=lambda content: content, **rules):
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path = tmp_path / name
        path.write_bytes(pack(b"\n".join(raw)))
        return load_samples(
            [path], tiny_tokenizer(VOCAB_SIZE), VOCAB_SIZE, sample_rules(64, 1, **rules)
        )

    return load


# Bad lines


def test_all_bad_lines_are_listed_by_reason(load, tmp_path):
    lines = [chat("hi"), GOOD, {"messages": []}, *[chat("<kind", "hi")] * 5, b"{", GOOD]
    with pytest.raises(ConfigError) as error:
        load(lines)
    head, *reasons = str(error.value).splitlines()
    path = tmp_path / "train.jsonl"
    assert head == (
        "8 of 10 lines cannot be used; mend or remove them, or raise data.skip_bad_lines (0), the "
        "share of lines that may be left out, to 0.8:"
    )
    assert reasons[0].startswith(f'6 x {path}:1: no message has the role "assistant" (roles: user)')
    assert reasons[0].endswith(f"(also {path}:4, {path}:5, {path}:6, ...)")
    assert [reason.split(": ")[0] for reason in reasons[1:]] == [f"1 x {path}:3", f"1 x {path}:9"]


def test_one_bad_line_is_one_sentence(load, tmp_path):
    with pytest.raises(ConfigError) as error:
        load([GOOD, chat("hi")])
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:2: no message has the role")
    assert "\n" not in str(error.value) and "data.skip_bad_lines (0)" in str(error.value)


def test_bad_lines_are_left_out_and_counted_up_to_the_share(load):
    dataset = load([GOOD, chat("hi"), b"[", GOOD], skip_bad_lines=0.5)
    assert len(dataset) == 2 and dataset.fingerprint == load([GOOD, GOOD]).fingerprint
    said = dataset.report.describe().splitlines()
    assert said[0].endswith("; left out 2 of 4 lines that cannot be used:")
    assert "train.jsonl:2: no message" in said[1] and "train.jsonl:3: not valid JSON" in said[2]
    with pytest.raises(ConfigError, match=r"2 of 3 lines .*lines \(0.5\).* to 0.6667:"):
        load([GOOD, chat("hi"), b"["], skip_bad_lines=0.5)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_is_below_one(tiny_run, share):
    with pytest.raises(ConfigError, match="data.skip_bad_lines .* must be a share of the lines"):
        tiny_config(tiny_run, data={"skip_bad_lines": share})


# The mask token


def test_a_mask_token_in_samples_is_refused_where_it_stands(load, tmp_path):
    lines = [tokens([1, 2, 7], [0, 1, 1]), tokens([1, 2], [1, 1]), tokens([7, 7], [1, 1])]
    with pytest.raises(ConfigError, match="2 of 3 lines cannot be used") as error:
        load(lines, mask_token_id=7)
    assert f"2 x {tmp_path / 'train.jsonl'}:1: model.mask_token_id (7) stands 1 times" in str(
        error.value
    )
    assert f"(also {tmp_path / 'train.jsonl'}:3)" in str(error.value)
    assert len(load(lines, mask_token_id=8)) == 3
    assert len(load(lines, mask_token_id=7, skip_bad_lines=0.7)) == 1


def test_a_mask_token_that_is_cut_off_harms_nobody(load):
    lines = [tokens([1] * 64 + [7], [1] * 65)]
    assert len(load(lines, mask_token_id=7)) == 1


def test_a_run_looks_for_its_own_mask_token(tiny_run):
    from dspark_megatron.run.data import sample_rules as rules_of

    config = tiny_config(tiny_run, data={"skip_bad_lines": 0.25})
    rules = rules_of(config)
    assert (rules.mask_token_id, rules.skip_bad_lines) == (config.model.mask_token_id, 0.25)


# Forms of files


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard])
def test_packed_lines_are_read(load, pack):
    def twice(content):  # as `cat a.gz b.gz` puts files together
        return pack(content + b"\n") + pack(content)

    assert load([GOOD, GOOD], pack=pack).fingerprint == load([GOOD, GOOD]).fingerprint
    assert load([GOOD], pack=twice).fingerprint == load([GOOD, GOOD]).fingerprint


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard])
def test_packed_lines_that_were_cut_short_are_no_shorter_file(load, pack):
    lines = [json.dumps(chat("hi", secrets.token_hex(500))).encode() for _ in range(200)]
    with pytest.raises(ConfigError, match=r"is damaged or cut short after line \d[\d,]*: "):
        load(lines, pack=lambda content: pack(content)[:-9], skip_bad_lines=0.9)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read(load, tmp_path, indent):
    array = json.dumps([GOOD, GOOD], indent=indent).encode()
    assert load([b"", array]).fingerprint == load([GOOD, GOOD]).fingerprint
    with pytest.raises(ConfigError, match="train.jsonl:2: a line must be a JSON object"):
        load([b"[" + json.dumps(GOOD).encode() + b", 3]"])
    with pytest.raises(
        ConfigError, match=r"begins with \[, so it is one JSON array, and is not val"
    ):
        load([b"[", json.dumps(GOOD).encode()])


def test_a_byte_order_mark_is_no_text(load):
    for content in (GOOD, [GOOD]):
        assert len(load([b"\xef\xbb\xbf" + json.dumps(content).encode()])) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PAR1\x15\x04", "is damaged or cut short: .* copy it"),
        (b"\xff\xff\xff\xff\x01", "is damaged or cut short: .* copy it"),
        (b"ARROW1\x00\x00", "is damaged or cut short: .* copy it"),
        (b"\x28\xb5\x2f\xfd\x00", "is damaged or cut short after line 0: .* copy it"),
        (b"PK\x03\x04", "is a ZIP archive, .* unzip"),
        (json.dumps(GOOD, indent=1).encode(), "has a JSON object over several lines, .*jq -c"),
        (
            gzip.compress(json.dumps(GOOD).encode() * 99, mtime=0)[:40],
            "is damaged or cut short after line 0: .* copy it",
        ),
    ],
)
def test_files_that_are_not_read_say_what_they_are(load, content, message):
    with pytest.raises(ConfigError, match=f"train.jsonl {message}"):
        load([content], skip_bad_lines=0.9)


def test_a_folder_gives_packed_files_and_passes_over_no_data(tmp_path):
    names = ["a.jsonl.gz", "b.jsonl", "c.jsonl.zst"]
    for name in (*names, "dataset_info.json"):
        (tmp_path / name).touch()
    assert [file.path.name for file in find_files(tmp_path)] == names
    (tmp_path / "d.zst").touch()
    with pytest.raises(ConfigError, match=r"has 1 files of data that are not read \(d.zst\)"):
        find_files(tmp_path)


def test_zstandard_without_its_package_says_what_to_install(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="train.jsonl is .* pip install pyarrow datasets"):
        load([GOOD], pack=zstandard)
