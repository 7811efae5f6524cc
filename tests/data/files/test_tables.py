"""Parquet and Arrow: the samples that the same lines of JSON give, and what is refused."""

import json

import pyarrow
import pytest

from dspark_megatron.data.dataset import load_samples
from dspark_megatron.data.files import jsonl, tables
from dspark_megatron.data.files.jsonl import parse_line
from dspark_megatron.data.files.reading import read_lines
from dspark_megatron.data.files.sources import DataFile, find_files
from dspark_megatron.data.prompts.chat_prompts import load_prompts, read_prompts
from dspark_megatron.data.tokenizing import batches
from dspark_megatron.errors import ConfigError
from support.chat_lines import chat, talk, tokens, write_jsonl
from support.samples import VOCAB_SIZE, sample_rules
from support.tables import as_table, write_arrow, write_parquet
from support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer

CALL = {"type": "function", "function": {"name": "add", "arguments": {"n": 3}}}
CALLED = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "the hill", "name": "add"},
        {"role": "assistant", "content": "hello", "reasoning_content": "kind"},
    ],
    "tools": [{"name": "add", "parameters": {"n": {"type": "number"}}}, {"name": "sub"}],
}
"""Every message has keys that the others lack, and so have the tools."""
SHOWS_KEYS = (
    "{% if tools %}{% for t in tools %}<{{ t.keys() | join(' ') }}>{{ t | tojson }}{% endfor %}"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.name is defined %}[name {{ m.name }}]{% endif %}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% if m.reasoning_content is defined %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Tells a key without a value from one that is not there."""
RECORDS = {
    "messages": [chat("hi", "hello"), chat("<kind", "hi", "the hill", "all", "in")],
    "conversations": [talk("hi", "hello"), {**talk("hi", "all"), "system": "kind"}],
    "calls": [CALLED, chat("hi", "the inn")],
    "texts": [{"prompt": "hi", "completion": "hello"}] * 40,
    "ids": [tokens([5, 6, 7], [0, 1, 1]), tokens([8, 9, 10, 11], [0, 0, 1, 1])],
    "several forms": [chat("hi", "hello"), {"prompt": "hi", "completion": "all"}],
}


def load(path, template=CHATML_TEMPLATE, **rules):
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = template
    return load_samples([str(path)], tokenizer, VOCAB_SIZE, sample_rules(200, 1, **rules))


def records_of(path):
    return [parse_line(line) for _, line in read_lines(DataFile(path, indexed=False))]


@pytest.fixture(params=["parquet", "parquet in small groups", "arrow file", "arrow stream"])
def write(request, tmp_path):
    def write(records, name="data.parquet"):
        if request.param.startswith("arrow"):
            return write_arrow(tmp_path / name, records, stream=request.param == "arrow stream")
        options = {"row_group_size": 3} if "small" in request.param else {}
        return write_parquet(tmp_path / name, records, **options)

    return write


# What is read


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("template", [CHATML_TEMPLATE, SHOWS_KEYS])
def test_a_table_gives_the_samples_of_its_lines(tmp_path, write, name, template):
    if "calls" in name and template == CHATML_TEMPLATE:
        return
    lines = write_jsonl(tmp_path / "data.jsonl", RECORDS[name])
    expected, found = load(lines, template), load(write(RECORDS[name]), template)
    assert found.fingerprint == expected.fingerprint and len(found) >= len(RECORDS[name])


def test_keys_without_a_value_are_left_out_at_any_depth(write):
    wanted = json.loads(json.dumps(CALLED))
    del wanted["messages"][1]["content"]  # null in JSON, too
    assert records_of(write([CALLED, chat("hi", "hello")])) == [wanted, chat("hi", "hello")]
    ids = pyarrow.table({"input_ids": [[1, None]], "loss_mask": [[True, False]]})
    assert records_of(write(ids)) == [{"input_ids": [1, None], "loss_mask": [True, False]}]


def test_json_text_of_objects_that_differ_is_read_as_objects(write):
    messages = [[json.dumps(m) for m in CALLED["messages"]]]
    kind = pyarrow.list_(pyarrow.json_())
    column = pyarrow.array(messages, pyarrow.list_(pyarrow.string())).cast(kind)
    assert records_of(write(pyarrow.table({"messages": column}))) == [
        {"messages": CALLED["messages"]}
    ]


def test_texts_and_numbers_stay_with_their_row_and_other_columns_are_not_read(write):
    row = {**chat("hi", "hello"), "id": 7, "score": 0.5, "ok": True, "source": "web"}
    others = {"embedding": [1.0, 2.0], "image": b"\x00", "about": {"a": 1}}
    assert records_of(write([{**row, **others}])) == [row]


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_other_types_of_text(write, kind):
    types = {"dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    kind = types.get(kind) or getattr(pyarrow, kind)()
    table = as_table([{"prompt": "hi", "completion": "all"}])
    table = table.set_column(0, "prompt", table["prompt"].cast(kind))
    assert records_of(write(table)) == [{"prompt": "hi", "completion": "all"}]


def test_rows_come_in_order_and_by_number(write):
    records = [{"prompt": "hi", "completion": str(i)} for i in range(2 * tables.BATCH_ROWS + 3)]
    file = DataFile(write(records), indexed=False)
    found = [(number, parse_line(line)["completion"]) for number, line in read_lines(file)]
    assert found == [(i + 1, str(i)) for i in range(len(records))]


def test_the_content_tells_what_a_file_is(tmp_path):
    lines = write_jsonl(tmp_path / "lines.parquet", [chat("hi", "hello")])
    table = write_parquet(tmp_path / "table.jsonl", [chat("hi", "hello")])
    assert records_of(lines) == records_of(table)


def test_a_folder_gives_its_parquet_files_by_name(tmp_path):
    for name, text in (("b", "all"), ("a", "hello")):
        write_parquet(tmp_path / f"train-{name}.parquet", [chat("hi", text)])
    assert [file.path.name for file in find_files(tmp_path)] == [
        "train-a.parquet",
        "train-b.parquet",
    ]
    assert len(load(tmp_path)) == 2
    write_jsonl(tmp_path / "c.jsonl", [chat("hi", "hello")])
    with pytest.raises(ConfigError, match="has 2 Parquet files beside 1 others, .*/\\*.parquet"):
        find_files(tmp_path)
    assert len(load(tmp_path / "*")) == 3


def test_prompts_are_read_from_tables(tmp_path, write):
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    rows = [{"messages": [{"role": "user", "content": f"hill {i}"}], "id": i} for i in range(3)]
    lines = write_jsonl(tmp_path / "p.jsonl", rows)
    expected = load_prompts(lines, tokenizer, 2, 64)
    assert load_prompts(write(rows), tokenizer, 2, 64) == expected and len(expected) == 2
    assert [prompt.record for prompt in read_prompts(write(rows), None)] == rows


# What is refused


BAD_TABLES = {
    "no known column": (
        as_table([{"text": "a", "label": 1}]),
        "must have a column messages, .* or input_ids, and has text, label; rename",
    ),
    "many columns": (
        pyarrow.table({f"c{i}": [1] for i in range(50)}),
        "c19 and 30 more; rename the one",
    ),
    "no column": (pyarrow.table({}), "and has none;"),
    "a text": (as_table([{"messages": "hi"}]), "messages must be a list of objects, and is string"),
    "a struct": (as_table([{"messages": {"role": "user"}}]), "must be a list of objects, and is"),
    "texts": (as_table([{"conversations": ["hi"]}]), "conversations must be a list of objects"),
    "bytes": (as_table([{"prompt": b"hi", "completion": "a"}]), "prompt must be a text or a list"),
    "floats": (as_table([{"input_ids": [1.0], "loss_mask": [1]}]), "list of whole numbers, and is"),
    "one id": (as_table([{"input_ids": 1, "loss_mask": [1]}]), "input_ids must be a list of whole"),
    "a mask of texts": (as_table([{"input_ids": [1], "loss_mask": ["1"]}]), "loss_mask must be a"),
    "numbers as tools": (as_table([{**chat("a", "b"), "tools": 7}]), "tools must be a list of obj"),
    "a time within": (
        pyarrow.table(
            {
                "messages": pyarrow.array(
                    [[]], pyarrow.list_(pyarrow.struct({"at": pyarrow.timestamp("s")}))
                )
            }
        ),
        r": messages.at is timestamp\[m?s\], which JSON does not have; cast",
    ),
    "a name twice": (
        pyarrow.table([[1], [2]], names=["messages", "messages"]),
        "has several columns of the name messages; rename",
    ),
    "a name twice among many": (
        pyarrow.table([["x"]] * 1100, names=["prompt", "c", *map(str, range(1097)), "c"]),
        "has several columns of the name c; rename",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_of_other_columns_is_refused_before_its_rows_are_read(write, name):
    table, message = BAD_TABLES[name]
    with pytest.raises(ConfigError, match=f"data.parquet.*{message}") as error:
        load(write(table), skip_bad_lines=0.9)
    assert "\n" not in str(error.value)


def test_rows_of_empty_tables(write):
    with pytest.raises(ConfigError, match="no samples in .*data.parquet: the files have no lines"):
        load(write(as_table([chat("hi", "hello")]).slice(0, 0)))
    nulls = pyarrow.table({"messages": pyarrow.nulls(2)})
    with pytest.raises(ConfigError, match="2 x .*data.parquet:1: a line must have one of"):
        load(write(nulls))


def test_bad_rows_are_named_counted_and_left_out(tmp_path, write):
    rows = [chat("hi", "hello"), chat("hi"), chat("hi", "all"), {"messages": []}]
    with pytest.raises(ConfigError, match="2 of 4 lines cannot be used") as error:
        load(write(rows))
    assert f"1 x {tmp_path}/data.parquet:2: no message has the role" in str(error.value)
    assert f"1 x {tmp_path}/data.parquet:4: " in str(error.value)
    good = write_jsonl(tmp_path / "good.jsonl", rows[::2])
    found = load(write(rows), skip_bad_lines=0.5)
    assert found.fingerprint == load(good).fingerprint and len(found.report.bad_lines) == 2


def test_a_row_is_bounded_as_a_line_is(tmp_path, write, monkeypatch):
    monkeypatch.setattr(jsonl, "MOST_LINE_BYTES", 2000)
    rows = [chat("hi", "hello")] * 20
    rows[5] = chat("hi", "x" * 2001)
    with pytest.raises(ConfigError, match="data.parquet:6: the line has 2,.* at most 2,000 are r"):
        load(write(rows))
    assert len(load(write(rows), skip_bad_lines=0.1)) == 19


def test_rows_are_handed_on_by_their_size_as_lines_are(write, monkeypatch):
    """Some batches of each process are in flight, and long rows are many bytes."""
    monkeypatch.setattr(batches, "_MOST_BYTES", 5000)
    [file] = find_files(write([chat("hi", "x" * 1000)] * 40))
    sizes = [len(batch.lines) for batch in batches.line_batches([file], None)]
    assert sum(sizes) == 40 and max(sizes) == 5


def test_text_that_is_not_utf8_is_a_bad_row(tmp_path, write):
    texts = pyarrow.array([b"hi", b"\xff\xfe", b"all"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    file = write(pyarrow.table({"prompt": text, "completion": ["hello"] * 3}))
    with pytest.raises(ConfigError, match="data.parquet:2: not valid Arrow data: .*UTF8"):
        load(file)
    assert len(load(file, skip_bad_lines=0.4)) == 2


def test_without_the_package_it_says_what_to_install(monkeypatch, write):
    file = write([chat("hi", "hello")])
    for name in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ConfigError, match="data.parquet is .* pip install pyarrow datasets"):
        load(file)
