"""Samples: which tokens are supervised, what is dropped, and errors in files."""

from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dspark_megatron.data.batch import MicroBatch
from dspark_megatron.data.blocks import draft_blocks
from dspark_megatron.data.conversation import ConversationEncoder, Sample, describe_sample
from dspark_megatron.data.dataset import ConversationDataset, load_samples
from dspark_megatron.data.files.jsonl import read_jsonl
from dspark_megatron.errors import ConfigError
from support.chat_lines import chat, tokens, write_jsonl
from support.paths import ROOT
from support.samples import GENERATION_TEMPLATE, VOCAB_SIZE, sample_rules, supervised_text
from support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer

SMOLLM2 = ROOT / "runs" / "quickstart" / "target"

CHATS = {
    "one turn": ["hi there", "all the best"],
    "two turns": ["hi", "hello in there", "and  \n then?", "tell  him\n\nall"],
    "system": ["<be kind", "hi", "hello"],
    "many-byte letters": ["wie geht's?", "schön 😀 größe"],
    "spaces at both ends": ["  hi  ", "  hello  "],
    "empty answer": ["hi", ""],
    "a newline that joins the header": ["hi", "hello\n", "more", "\n\nyes"],
    "answers in a row": ["hi", "hello", ">and more"],
}


def encode(tokenizer: PreTrainedTokenizerFast, record: dict) -> Sample:
    [sample] = ConversationEncoder(tokenizer, len(tokenizer)).encode(record)
    return sample


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    """Records (written to a file) to a dataset."""

    def load(records: list[dict], *, max_length=64, min_loss_tokens=2) -> ConversationDataset:
        path = write_jsonl(tmp_path / "train.jsonl", records)
        rules = sample_rules(max_length, min_loss_tokens)
        return load_samples([path], tokenizer, VOCAB_SIZE, rules)

    return load


# The tiny tokenizer
@pytest.mark.parametrize("vocab_size", [267, 320, 512])
def test_tiny_tokenizer_has_the_size_and_survives_saving(vocab_size: int, tmp_path: Path) -> None:
    made = tiny_tokenizer(vocab_size)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(made) == len(loaded) == vocab_size
    record = chat("hi the re", "größe <|mask|>")
    assert encode(made, record).input_ids.tolist() == encode(loaded, record).input_ids.tolist()
    assert loaded.eos_token == "<|im_end|>" and loaded.mask_token == "<|mask|>"
    assert len({loaded.eos_token_id, loaded.pad_token_id, loaded.mask_token_id}) == 3
    assert loaded.decode(loaded("größe 😀").input_ids) == "größe 😀"


def test_tiny_tokenizer_refuses_a_size_without_room() -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(200\) must be at least 267"):
        tiny_tokenizer(200)


# Masks of chats
def test_the_answers_and_their_end_of_turn_are_supervised(tokenizer) -> None:
    record = chat("<be kind", "hi", "hello", "and?", "bye")
    sample = encode(tokenizer, record)
    rendered = tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=True)
    assert sample.input_ids.tolist() == rendered["input_ids"]
    assert supervised_text(tokenizer, sample) == "hello<|im_end|>bye<|im_end|>"
    assert sample.input_ids.dtype == torch.int32 and sample.loss_mask.dtype == torch.bool


@pytest.mark.parametrize("name", CHATS)
def test_the_newline_after_the_end_of_turn_is_not_supervised(tokenizer, name: str) -> None:
    sample = encode(tokenizer, chat(*CHATS[name]))
    last = sample.loss_mask.nonzero().max()
    assert sample.input_ids[last] == tokenizer.eos_token_id
    assert tokenizer.decode(sample.input_ids[last + 1 :]) == "\n"


@pytest.mark.parametrize("name", [n for n in CHATS if n != "a newline that joins the header"])
def test_both_kinds_of_template_agree(tokenizer, name: str) -> None:
    record = chat(*CHATS[name])
    by_comparing = encode(tokenizer, record)
    tokenizer.chat_template = GENERATION_TEMPLATE
    by_marks = encode(tokenizer, record)
    assert by_marks.input_ids.tolist() == by_comparing.input_ids.tolist()
    assert by_marks.loss_mask.tolist() == by_comparing.loss_mask.tolist()
    answers = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
    assert supervised_text(tokenizer, by_marks) == "".join(a + "<|im_end|>" for a in answers)


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, GENERATION_TEMPLATE])
def test_an_answer_that_was_cut_short_does_not_teach_its_end(tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    record = chat("hi", "one", "more", "two")
    whole = supervised_text(tokenizer, encode(tokenizer, record))
    cut = supervised_text(tokenizer, encode(tokenizer, {**record, "finish_reason": "length"}))
    assert whole.count("<|im_end|>") == 2 and cut == whole.removesuffix("<|im_end|>")


def test_a_token_that_begins_in_the_header_is_not_supervised(tokenizer) -> None:
    sample = encode(tokenizer, chat("hi", "\n\nyes"))  # the header's "\n" and the first are one
    assert supervised_text(tokenizer, sample) == "\nyes<|im_end|>"


def test_an_end_of_turn_that_is_not_the_eos_token(tokenizer) -> None:
    tokenizer.eos_token = "<|pad|>"
    sample = encode(tokenizer, chat("hi", "hello"))
    assert supervised_text(tokenizer, sample) == "hello<|im_end|>"


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, GENERATION_TEMPLATE])
@pytest.mark.parametrize("name", CHATS)
def test_trimmed_offsets_give_the_same_mask(tokenizer, name: str, template: str) -> None:
    expected = encode(tokenizer, chat(*CHATS[name]))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.chat_template = template
    assert encode(tokenizer, chat(*CHATS[name])).loss_mask.tolist() == expected.loss_mask.tolist()


def test_a_token_of_spaces_before_an_answer_is_not_supervised(tokenizer) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + ':  ' }}"
        "{% else %}{{ m['content'] + '<|im_end|>  ' }}{% endif %}{% endfor %}"
    )
    sample = encode(tokenizer, chat("hi", "\nyes"))
    assert supervised_text(tokenizer, sample) == "\nyes<|im_end|>"


def test_words_after_the_last_special_token_stay_supervised(tokenizer) -> None:
    sample = encode(tokenizer, chat("hi", "one<|mask|>two"))
    assert supervised_text(tokenizer, sample) == "one<|mask|>two<|im_end|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    sample = encode(tokenizer, chat("hi", "one<|mask|>two"))
    assert supervised_text(tokenizer, sample) == "one<|mask|>two\n"


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%+generation%}"])
def test_a_template_that_marks_nothing_is_refused(tokenizer, tag: str) -> None:
    end = "{% endgeneration %}"
    tokenizer.chat_template = tokenizer.chat_template + "{% if 0 %}" + tag + end + "{% endif %}"
    with pytest.raises(ConfigError, match="marks none of its"):
        encode(tokenizer, chat("hi", "hello"))


def test_a_tokenizer_without_a_template_takes_ids_only(tokenizer) -> None:
    tokenizer.chat_template = None
    assert encode(tokenizer, tokens([1, 2], [0, 1])).loss_mask.tolist() == [False, True]
    with pytest.raises(ConfigError, match="no .* chat template; add chat_template.jinja"):
        encode(tokenizer, chat("hi", "hello"))


@pytest.mark.skipif(not (SMOLLM2 / "tokenizer.json").is_file(), reason="no quickstart target")
def test_smollm2() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    sample = encode(tokenizer, chat("Hi", "Hello there.", "More?", "No, thanks.\n\n  Bye"))
    expected = "Hello there.<|im_end|>No, thanks.\n\n  Bye<|im_end|>"
    assert supervised_text(tokenizer, sample) == expected


# Malformed lines
def with_message(message: object) -> dict:
    return {"messages": [message]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "hi"}, r'one of "messages", .*\[\'text\'\]'),
        (
            {**chat("hi", "hello"), **tokens([1], [1])},
            '"input_ids" must be the tokens of "messages"',
        ),
        ({"conversations": [], **tokens([1], [1])}, 'one of "messages"'),
        ({"messages": []}, r"at least one message, not \[\]"),
        ({"messages": "hi"}, "at least one message, not 'hi'"),
        (with_message("hi"), "message 0 must be an object"),
        (with_message({"role": 3, "content": "x"}), 'message 0 .* string "role"'),
        (with_message({"role": "user", "content": None}), 'message 0 .user. .* "content"'),
        (chat("hi"), r'no message has the role "assistant" \(roles: user\)'),
        (tokens([1, 2], [1]), r'"input_ids" \(2\) and "loss_mask" \(1\)'),
        ({"input_ids": [1]}, '"loss_mask" must be a list, not None'),
        (tokens([1, True], [1, 1]), r"input_ids\[1\] must be an integer, not True"),
        (tokens([1, 2], [1, 2]), r"loss_mask\[1\] must be 0 or 1, not 2"),
        (tokens([1, 2], [1, [1]]), r"loss_mask\[1\] must be 0 or 1, not \[1\]"),
        (tokens([1, 320], [1, 1]), r"\[320\] are outside the target's vocabulary \[0, 320\)"),
        (tokens([1, -1], [1, 1]), r"\[-1\] are outside"),
        (with_message({"role": "assistant", "content": [{}]}), "has a part that is no text"),
        (with_message({"role": "assistant", "content": "x"}), "after the first 1, which are cont"),
        (chat("hi", "\ud800"), "not valid Unicode"),
    ],
)
def test_a_malformed_line_is_named(load, tmp_path: Path, record: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load([chat("hi", "hello"), record])
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:2: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [', "not valid JSON: Expecting value"),
        (b'{"messages": "\xff"}', "not valid JSON"),
        (b"[1, 2]", "a line must be a JSON object .*, not a list"),
    ],
)
def test_lines_that_are_no_objects(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n' + line + b"\n")
    lines = read_jsonl(path)
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(ConfigError, match=f"bad.jsonl:4: {message}"):
        next(lines)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*none.jsonl: No such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


# The dataset
def test_samples_come_back_as_they_were(load) -> None:
    records = [tokens([5, 6, 319], [0, 1, 1]), tokens([7, 8], [True, True])]
    dataset = load(records)
    assert len(dataset) == 2
    for record, sample in zip(records, dataset, strict=True):  # the end is an IndexError
        assert sample.input_ids.tolist() == record["input_ids"]
        assert sample.loss_mask.tolist() == [bool(m) for m in record["loss_mask"]]
        assert sample.input_ids.dtype == torch.int64 and sample.loss_mask.dtype == torch.bool
    with pytest.raises(IndexError):
        dataset[-1]


def test_truncation_comes_before_the_counting(load) -> None:
    dataset = load(
        [
            tokens([1] * 6, [0, 0, 0, 1, 1, 1]),  # cut to 5: two supervised are left
            tokens([2] * 6, [0, 0, 0, 0, 1, 1]),  # cut to 5: one is left
            tokens([3] * 5, [1, 0, 1, 0, 1]),  # three, none adjacent
            tokens([4] * 5, [1, 1, 0, 0, 0]),
            tokens([5] * 2, [0, 0]),
            tokens([], []),
        ],
        max_length=5,
    )
    report = dataset.report
    assert (report.kept, report.too_few_loss_tokens, report.no_anchor) == (2, 3, 1)
    assert (report.read, report.truncated) == (6, 2)
    assert (report.total_tokens, report.loss_tokens) == (10, 4)
    assert [sample.input_ids.tolist() for sample in dataset] == [[1] * 5, [4] * 5]
    assert report.describe() == (
        "data: kept 2 of 6 samples with 10 tokens, 4 of them supervised; dropped 3 with too few "
        "supervised tokens and 1 without an anchor; cut 2 to the largest length"
    )


def test_nothing_left_is_an_error_with_numbers(load) -> None:
    records = [tokens([1] * 9, [0] * 8 + [1]), tokens([2, 3, 4], [1, 0, 1])]
    message = (
        r"all 2 samples of .*: 1 have fewer than data.min_loss_tokens \(2\) .* within "
        r"data.max_length \(8\), 1 have no anchor .*; 1 were longer"
    )
    with pytest.raises(ConfigError, match=message):
        load(records, max_length=8)


def test_empty_files_are_an_error(load) -> None:
    with pytest.raises(ConfigError, match="no samples in .*train.jsonl"):
        load([])


def test_fingerprint_tells_data_apart(load) -> None:
    first, second = tokens([1, 2, 3], [0, 1, 1]), tokens([4, 5], [1, 1])
    fingerprint = load([first, second]).fingerprint
    assert fingerprint == load([first, second]).fingerprint and len(fingerprint) == 64
    others = [
        [second, first],
        [first],
        [tokens([1, 2, 9], [0, 1, 1]), second],
        [tokens([1, 2, 3], [1, 1, 1]), second],
        [tokens([1, 2, 3, 4], [0, 1, 1, 1]), tokens([5, 5], [1, 1])],
        [tokens([1, 2], [1, 1]), tokens([3, 4, 5], [1, 1, 1])],
    ]
    assert len({load(other).fingerprint for other in others} | {fingerprint}) == 7


def test_several_files_in_their_order(tokenizer, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [tokens([i, i], [1, 1])] * 2) for i in (7, 3)]
    dataset = load_samples(files, tokenizer, VOCAB_SIZE, sample_rules(8, 1))
    assert [sample.input_ids[0].item() for sample in dataset] == [7, 7, 3, 3]


def test_a_batch_is_padded_to_the_longest_on_the_right(load) -> None:
    dataset = load([tokens([1, 2, 3], [0, 1, 1]), tokens([4, 5], [1, 1])])
    ids, masks = zip(dataset[0], dataset[1], strict=True)
    batch = MicroBatch.of(ids, draft_blocks(ids, masks, [torch.tensor([1])] * 2, 2))
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 0]] and batch.lengths == [3, 2]
    assert batch.input_ids.dtype == torch.int64


def test_a_shown_sample_marks_what_is_supervised(tokenizer) -> None:
    text = describe_sample(encode(tokenizer, chat("hi", "hello")), tokenizer)
    counts, _, shown = text.partition("\n")
    assert shown == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦hello<|im_end|>⟧\n")
    sample = encode(tokenizer, chat("hi", "hello"))
    assert f"{len(sample.input_ids)} tokens, {sample.loss_mask.sum()} of them" in counts
