"""Files of data: lines, forms, links and pipes, and indexed datasets whose pointers lie."""

import gzip
import json
import random
import struct

import numpy
import pyarrow
import pytest
import torch

from dspark_megatron.data.chats import bounded_rendering
from dspark_megatron.data.chats.messages import Chat
from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.dataset import load_samples
from dspark_megatron.data.files import jsonl
from dspark_megatron.data.files.bad_lines import NoFurther
from dspark_megatron.data.files.reading import read_lines
from dspark_megatron.data.files.sources import DataFile
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.indexed_dataset import read_indexed
from support.hostile import DEEP, make_strange, refused
from support.samples import VOCAB_SIZE, sample_rules
from support.tables import write_arrow, write_parquet
from support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer

QUESTION = {"role": "user", "content": "hill"}
ANSWER = {"role": "assistant", "content": "the hill in the inn"}
GOOD = {"messages": [QUESTION, ANSWER]}
TOO_DEEP = "is nested too deeply: at most 100 levels are read"
NO_JSON = "not valid JSON"


def load(path, template=CHATML_TEMPLATE, **rules):
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = template
    rules = sample_rules(64, 1, **rules)
    return load_samples([str(path)], tokenizer, VOCAB_SIZE, rules, read_indexed=read_indexed)


def call(arguments):
    function = {"name": "f", "arguments": arguments}
    return {**ANSWER, "tool_calls": [{"type": "function", "function": function}]}


LINES = [
    (b"\x00" * 1000, NO_JSON),
    (b"\x80\x81\x82", NO_JSON),
    (b'{"a": ', NO_JSON),
    (b"x", NO_JSON),
    (b"7", "a line must be a JSON object"),
    (b"null", "a line must be a JSON object"),
    (b'"text"', "a line must be a JSON object"),
    (b'{"a":' * 100_000, TOO_DEEP),
    (b'{"messages":' + b"[" * 200 + b"]" * 200 + b"}", TOO_DEEP),
    (b'{"messages": "hi"}', '"messages" must be a list'),
    (b'{"messages": []}', '"messages" must be a list of at least one'),
    (b'{"messages": {"role": "user"}}', '"messages" must be a list'),
    (b'{"messages": [7]}', "message 0 must be an object"),
    (b'{"messages": [{"role": 7}]}', "message 0 must be an object with a string"),
    (b'{"messages": [{"role": "user", "content": Infinity}]}', "message 0 (user) must have a"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', ""),
    (b'{"conversations": [{"from": "nobody", "value": "x"}]}', 'turn 0 is "from"'),
    (b'{"conversations": [{"from": "human", "value": 7}]}', 'must have a "value"'),
    (b'{"prompt": 1, "completion": 2}', '"prompt" and "completion" must be'),
    (b'{"input_ids": [-1, 2], "loss_mask": [1, 1]}', "outside the target's vocabulary"),
    (b'{"input_ids": [1%s], "loss_mask": [1]}' % (b"0" * 30), "outside the target's vocabulary"),
    (b'{"input_ids": [1%s], "loss_mask": [1]}' % (b"0" * 5000), NO_JSON),
    (b'{"input_ids": [1.0], "loss_mask": [1]}', "input_ids[0] must be an integer"),
    (b'{"input_ids": [true], "loss_mask": [1]}', "input_ids[0] must be an integer"),
    (b'{"input_ids": [1], "loss_mask": [NaN]}', "loss_mask[0] must be 0 or 1"),
    (b'{"input_ids": [1], "loss_mask": [1, 1]}', "must be equally long"),
    (b'{"input_ids": "abc", "loss_mask": [1]}', '"input_ids" must be a list'),
    (json.dumps({**GOOD, "tools": DEEP}).encode(), TOO_DEEP),
    (json.dumps({**GOOD, "tools": 7}).encode(), '"tools" must be a list'),
    (json.dumps({"messages": [QUESTION, call(DEEP)]}).encode(), TOO_DEEP),
    (json.dumps({"messages": [QUESTION, call("[1]")]}).encode(), "that are no JSON object"),
    (json.dumps({**GOOD, "system": 7}).encode(), '"system" must be a string'),
    (json.dumps({**GOOD, "chat_template_kwargs": [1]}).encode(), "must be an object"),
    *(
        (json.dumps({**GOOD, "chat_template_kwargs": {key: "x"}}).encode(), f"gives {key}, which")
        for key in ("chat_template", "padding", "max_length", "conversation", "return_tensors")
    ),
    (json.dumps({"messages": [QUESTION, ANSWER] * 1001}).encode(), "at most 2,000 are read"),
    (b"[1, 2]", "a line must be a JSON object"),
    (b"[{}", "is one JSON array, and is not valid"),
    (b"[" * 100_000, "is one JSON array, and is not valid"),
    (b"{\n}", "has a JSON object over several lines"),
    (b"PAR1", "is damaged or cut short"),
    (b"PK\x03\x04", "is a ZIP archive"),
    (b"\x1f\x8b\x08\x00", "is damaged or cut short"),
    (gzip.compress(json.dumps(GOOD).encode(), mtime=0)[:-5], "is damaged or cut short"),
    (gzip.compress(b"\x80\x81\x82", mtime=0), NO_JSON),
    (b"\x28\xb5\x2f\xfd", "is damaged or cut short after line 0"),
    (b"\x28\xb5\x2f\xfd" + b"garbage" * 99, "is damaged or cut short after line 0"),
    (b"PAR1" + b"garbage" * 99 + b"PAR1", "is damaged or cut short"),
    (b"PARE" + bytes(99) + b"PARE", "is damaged or cut short"),
    (b"ARROW1" + b"garbage" * 99 + b"ARROW1", "is damaged or cut short"),
    (b"\xff\xff\xff\xff" * 99, "is damaged or cut short"),
    (b"", "the files have no lines"),
    (b"\n \n", "the files have no lines"),
]


@pytest.mark.parametrize(("content", "fragment"), LINES)
def test_a_line_that_is_no_sample(tmp_path, content, fragment):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    assert str(path) in refused(lambda: load(path), fragment, lines=3)


def test_the_good_line_passes(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD))
    assert len(load(path)) == 1


def test_a_long_line_is_passed_over_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MOST_LINE_BYTES", 2000)
    path = tmp_path / "x.jsonl"
    long = json.dumps({"messages": [QUESTION, {**ANSWER, "content": "x" * 5_000_000}]})
    path.write_text(f"{long}\n{json.dumps(GOOD)}\n")
    message = refused(lambda: load(path), "x.jsonl:1: the line has 5,000,0")
    assert "at most 2,000 are read" in message
    dataset = load(path, skip_bad_lines=0.5)
    assert len(dataset) == 1 and len(dataset.report.bad_lines) == 1


def test_an_array_is_bounded_as_a_whole_and_by_item(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([GOOD] * 100))
    assert len(load(path)) == 100
    monkeypatch.setattr(jsonl, "MOST_LINE_BYTES", 20)
    refused(lambda: load(path), "the item has", lines=3)
    monkeypatch.setattr(jsonl, "MOST_ARRAY_BYTES", 1000)
    refused(lambda: load(path), "has more than 1,000 bytes, which are read whole")


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_bomb_of_zeros_is_passed_over(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(jsonl, "MOST_LINE_BYTES", 2**20)
    path = tmp_path / "x.jsonl.gz"
    zeros = b"\0" * 2**26
    path.write_bytes(
        gzip.compress(zeros, 1)
        if codec == "gzip"
        else pyarrow.compress(zeros, codec=codec, asbytes=True)
    )
    refused(lambda: load(path), "the line has 67,108,864 bytes")


def test_a_row_that_unpacks_to_far_more_is_passed_over(tmp_path):
    zeros = {"messages": [QUESTION, {**ANSWER, "content": "\0" * 2**25}]}
    path = write_parquet(tmp_path / "x.parquet", [zeros, GOOD], compression="zstd")
    assert path.stat().st_size < 2**17
    refused(lambda: load(path), "x.parquet:1: the line has 33,554,")
    assert len(load(path, skip_bad_lines=0.5)) == 1


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.stream", "x.jsonl.zst"])
def test_a_file_with_any_bytes_changed_is_read_or_named(tmp_path, name):
    """Not one changed byte may end the process, or raise what no one catches."""
    path, rows = tmp_path / name, [GOOD] * 40
    if name.endswith("zst"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(pyarrow.compress(lines.encode(), codec="zstd", asbytes=True))
    elif name.endswith("parquet"):
        write_parquet(path, rows, row_group_size=7)
    else:
        write_arrow(path, rows, stream=name.endswith("stream"))
    whole, numbers = path.read_bytes(), random.Random(0)
    for i in range(150):
        content = bytearray(whole[: numbers.randrange(len(whole))] if i % 3 == 0 else whole)
        for _ in range(numbers.choice((0, 1, 9)) if content else 0):
            content[numbers.randrange(len(content))] = numbers.randrange(256)
        path.write_bytes(content)
        try:
            for _, line in read_lines(DataFile(path, indexed=False)):
                assert isinstance(line, bytes | jsonl.Row | jsonl.Unusable)
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "loop"])
@pytest.mark.parametrize("entry", ["x", "", "*", "**/*"])
@pytest.mark.parametrize("end", ["jsonl", "parquet"])
def test_what_is_no_file_of_data_is_named(tmp_path, kind, entry, end):
    (tmp_path / "data").mkdir()
    make_strange(tmp_path / "data" / f"x.{end}", kind)
    entry = f"{entry}.{end}" if entry else ""
    refused(lambda: load(tmp_path / "data" / entry), f"x.{end} m")


def test_a_link_to_a_folder_above_gives_no_file_twice(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "again").symlink_to(".")
    assert len(load(tmp_path / "**" / "*.jsonl")) == 1


@pytest.mark.parametrize("entry", ["", "/dev/zero", "/dev/null", "/nowhere/at/all", "x" * 256])
def test_entries_that_are_no_data(entry):
    refused(lambda: load(entry), "data file")


@pytest.fixture
def indexed(tmp_path):
    """Six documents of twenty tokens, and how to change the index."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "documents"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for first in range(6):
        builder.add_item(torch.arange(20) + first)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


LENGTHS, POINTERS, BOUNDS = 34, 34 + 6 * 4, 34 + 6 * 12
INDEX_FIELDS = {
    "magic": (0, "B", 88, "it begins otherwise"),
    "version": (9, "<Q", 7, "of version 1, but 7"),
    "type": (17, "B", 99, "it has no type of number 99"),
    "type of floats": (17, "B", 6, "must hold token ids and holds float64"),
    "sequences": (18, "<Q", 2**62, "it speaks of 4,611,686,018,427,387,904 sequences"),
    "fewer sequences": (18, "<Q", 5, "it speaks of 5 sequences"),
    "documents": (26, "<Q", 2**62, "bounds of documents"),
    "negative length": (LENGTHS, "<i", -5, "a sequence has a negative length"),
    "long sequence": (LENGTHS, "<i", 2**30, "must have the 4,294,967,696 bytes"),
    "negative pointer": (POINTERS, "<q", -80, "the first of them sequence 0"),
    "far pointer": (POINTERS + 8, "<q", 10**12, "the first of them sequence 1"),
    "other pointer": (POINTERS + 16, "<q", 0, "the first of them sequence 2"),
    "far bound": (BOUNDS + 8, "<q", 10**9, "must rise from 0 to 6"),
    "negative bound": (BOUNDS + 8, "<q", -3, "must rise from 0 to 6"),
    "falling bound": (BOUNDS + 8, "<q", 4, "must rise from 0 to 6"),
    "first bound": (BOUNDS, "<q", 1, "must rise from 0 to 6"),
}


@pytest.mark.parametrize("name", INDEX_FIELDS)
def test_an_index_that_lies(indexed, name):
    offset, form, value, fragment = INDEX_FIELDS[name]
    index = indexed.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    struct.pack_into(form, content, offset, value)
    index.write_bytes(content)
    assert str(indexed) in refused(lambda: load(indexed), fragment)


@pytest.mark.parametrize("length", [0, 5, 33, 40, 161, 163])
def test_an_index_of_another_length(indexed, length):
    index = indexed.with_suffix(".idx")
    index.write_bytes((index.read_bytes() + b"x")[:length])
    refused(lambda: load(indexed), "is no index of a Megatron dataset")


def test_the_good_index_passes(indexed):
    assert len(load(indexed)) == 6


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
TEMPLATES = {
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 0.2 seconds of processor time",
    ),
    "squares": (
        "{% set n = namespace(x=99) %}"
        "{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "takes more than 0.2 seconds of processor time",
    ),
    "lipsum": ("{{ lipsum(n=10000000) }}", "takes more than 0.2 seconds of processor time"),
    "gigabytes": ("{{ 'a' * 100000000000 }}", "bytes of memory"),
    "a wide number": ("{{ '%99999999999d' % 1 }}", "bytes of memory"),
    "a long list": ("{{ [1] * 100000000000 }}", "bytes of memory"),
    "a long text": ("{{ 'a' * 100001 }}", "letters of this chat, and at most 100,000 are used"),
    "powers": ("{{ 10 ** 10 ** 10 }}", "raises to powers"),
    "powers of an empty text": ("{{ ''.format()**9 }}", "raises to powers"),
    "a long template": ("a" * 2**20, "letters, and at most 1,048,576 are read"),
    "a large range": ("{{ range(10000000) }}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "syntax": ("{% if %}", "TemplateSyntaxError"),
    "nothing": ("{% if false %}", "TemplateSyntaxError"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_takes_too_much(tmp_path, monkeypatch, name):
    start, fragment = TEMPLATES[name]
    if "seconds" in fragment:
        monkeypatch.setattr(bounded_rendering, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(bounded_rendering, "MOST_LETTERS", 100_000)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD))
    refused(lambda: load(path, start + CHATML_TEMPLATE), fragment)


def test_the_rendering_that_marks_answers_is_bounded_too(monkeypatch):
    monkeypatch.setattr(bounded_rendering, "MOST_SECONDS", 0.2)
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = MARKED
    template, apply = ChatTemplate(tokenizer), tokenizer.apply_chat_template
    chat = Chat([QUESTION, ANSWER], {})
    assert any(template.encode(chat)[0][1])

    def endless(messages, *, tokenize, **options):
        while tokenize:
            pass
        return apply(messages, tokenize=tokenize, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", endless)
    with pytest.raises(NoFurther, match="takes more than 0.2 seconds of processor time"):
        template.encode(chat)


@pytest.mark.parametrize(
    "start",
    [
        "{% set n = namespace(**{'x': '**'}) %}{{ dict( **{'y': n.x}).y }}",
        "{{ dict(a=1, **{'y': 2}).y }}",
        "**{{ 'bold' }}**",
        "{{ '(' }}**{% if true %}**{% endif %}",
    ],
)
def test_two_stars_that_are_no_power(tmp_path, start):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(GOOD))
    assert len(load(path, start + CHATML_TEMPLATE)) == 1


def test_a_template_without_end_ends_the_reading_at_its_first_chat(tmp_path, monkeypatch):
    """Else a thousand lines would take the limit each."""
    monkeypatch.setattr(bounded_rendering, "MOST_SECONDS", 0.2)
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n" * 1000)
    template = TEMPLATES["nested loops"][0] + CHATML_TEMPLATE
    refused(lambda: load(path, template, skip_bad_lines=0.9), "x.jsonl:1: the chat template takes")
