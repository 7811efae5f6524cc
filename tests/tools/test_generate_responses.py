"""The answers of tools/generate_responses.py: their order, resumption, and errors in the input."""

import json
import re
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import generate_responses as tool
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.conversation import ConversationEncoder
from dspark_megatron.data.prompts import local_target
from dspark_megatron.data.prompts.chat_prompts import Prompt, make_prompt, read_prompts
from dspark_megatron.data.prompts.local_target import LocalTarget
from support.chat_lines import prompt, read_rows, write_jsonl, write_lines
from support.hostile import with_key

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "sea"]
SPECIAL = ["<|start|>", "<|end|>", "<unk>"]
CHAT_TEMPLATE = (
    "{% if messages[0].content == 'unspeakable' %}{{ raise_exception('no such word') }}{% endif %}"
    "{% for m in messages %}<|start|> {{ m.role }} {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
)
OPTIONS = ["--max-new-tokens", "12", "--batch-size", "3", "--seed", "5", "--device", "cpu"]


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer model and a tokenizer of one id per word."""
    folder = tmp_path_factory.mktemp("target")
    vocabulary = [*SPECIAL, "system", "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|end|>", bos_token="<|start|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # spreads the logits, so that greedy choices are no near-ties
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    # As in many released models: values that would bend the distribution if they were used.
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Eight prompts of unlike length: two batches of three and one of two."""
    rows = [prompt(*(WORDS[(i + j) % 12] for j in range(1 + i * 5 % 7))) for i in range(8)]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


def arguments(target: Path, source: Path, output: Path, *options: str) -> list[str]:
    files = ["--target", str(target), "--input", str(source), "--output", str(output)]
    return [*files, *OPTIONS, *options]


def run(target: Path, source: Path, output: Path, *options: str) -> Path:
    assert tool.main(arguments(target, source, output, *options)) == 0
    return output


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the tool where it must give up before it loads the model; returns its one line."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model must not be loaded")

    def refused(*args: object) -> str:
        monkeypatch.setattr(local_target.AutoModelForCausalLM, "from_pretrained", fail)
        capsys.readouterr()  # what earlier runs wrote
        assert tool.main(arguments(*args)) == 2
        out, error = capsys.readouterr()
        assert (out, error[:7], error.count("\n")) == ("", "error: ", 1)
        return error

    return refused


def kill_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run die when it starts the batch after the first `batches`."""
    answer, calls = LocalTarget.answer, []

    def dying(*args: object) -> list:
        if len(calls) == batches:
            raise Killed
        calls.append(args)
        return answer(*args)

    monkeypatch.setattr(LocalTarget, "answer", dying)


# Answers
def test_answers_are_appended_in_input_order(target: Path, prompts: Path, tmp_path: Path) -> None:
    rows, answered = read_rows(prompts), read_rows(run(target, prompts, tmp_path / "out.jsonl"))
    assert [row["messages"][:-1] for row in answered] == [row["messages"] for row in rows]
    assert all(row["messages"][-1]["role"] == "assistant" for row in answered)
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.jsonl"}


def test_an_answer_is_cut_or_stopped_and_bears_no_special_token(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    answered = read_rows(run(target, prompts, tmp_path / "out.jsonl", "--temperature", "3"))
    assert {row["finish_reason"] for row in answered} == {"stop", "length"}
    assert not any(word in row["messages"][-1]["content"] for row in answered for word in SPECIAL)


def test_an_answer_keeps_the_tokens_that_the_target_saw_and_wrote(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    """So it trains whatever the template makes of it, and teaches what was written."""
    answered = read_rows(run(target, prompts, tmp_path / "out.jsonl", "--temperature", "3"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    asked = read_prompts(prompts, ChatTemplate(tokenizer))
    encoder = ConversationEncoder(tokenizer, len(tokenizer))
    tokenizer.chat_template = "{{ raise_exception('not asked') }}"
    for row, (prompt_ids, *_) in zip(answered, asked, strict=True):
        [sample] = encoder.encode(row)
        seen = sample.input_ids[~sample.loss_mask].tolist()
        written = sample.input_ids[sample.loss_mask].tolist()
        assert seen + written == sample.input_ids.tolist() and seen == prompt_ids
        assert (written[-1] == tokenizer.eos_token_id) == (row["finish_reason"] == "stop")
        text = tokenizer.decode(written, skip_special_tokens=True)
        assert text == row["messages"][-1]["content"]

    bare = read_rows(
        run(target, prompts, tmp_path / "bare.jsonl", "--temperature=3", "--messages-only")
    )
    rest = [{k: row[k] for k in row if k not in ("input_ids", "loss_mask")} for row in answered]
    assert bare == rest
    again = write_jsonl(tmp_path / "again.jsonl", answered)
    # Old tokens go with the old answer.
    options = ("--temperature=3", "--messages-only")
    assert read_rows(run(target, again, tmp_path / "bare2.jsonl", *options)) == bare


def test_a_template_that_reads_the_clock_has_one_day(
    target: Path, prompts: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    partial = tmp_path / "out.jsonl.partial"
    assert local_target.template_day(tokenizer, None, partial) is None
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    assert local_target.template_day(tokenizer, None, partial) == date.today().isoformat()
    partial.write_text('{"template_date": "2026-03-05"}\n')
    assert local_target.template_day(tokenizer, None, partial) == "2026-03-05"
    assert local_target.template_day(tokenizer, "2026-03-06", partial) == "2026-03-06"
    partial.unlink()
    clocked = shutil.copytree(target, tmp_path / "clocked")
    tokenizer.save_pretrained(clocked)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        kill_after(0, monkeypatch)
        run(clocked, prompts, tmp_path / "out.jsonl")
    assert read_rows(partial)[0]["template_date"] == date.today().isoformat()
    partial.unlink()
    error = refusal(target, prompts, tmp_path / "out.jsonl", "--template-date", "5 March")
    assert "--template-date (5 March) must be like 2026-01-31" in error


def test_an_old_answer_is_replaced_and_other_keys_are_kept(target: Path, tmp_path: Path) -> None:
    bare = {"id": "a7", **prompt("red", "cat")}
    old_answer = {"role": "assistant", "content": "blue blue blue"}
    with_answer = {**bare, "messages": [*bare["messages"], old_answer], "finish_reason": "old"}
    for name, row in (("bare", bare), ("with_answer", with_answer)):
        source = write_jsonl(tmp_path / name, [row])
        run(target, source, tmp_path / f"{name}.jsonl")
    first, second = (read_rows(tmp_path / f"{name}.jsonl") for name in ("bare", "with_answer"))
    assert first == second
    assert first[0]["id"] == "a7"
    assert len(first[0]["messages"]) == 2


def test_greedy_in_batches_equals_greedy_one_by_one(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    batched = run(target, prompts, tmp_path / "batched.jsonl", "--temperature", "0")
    single = run(target, prompts, tmp_path / "single.jsonl", "--temperature=0", "--batch-size=1")
    assert batched.read_bytes() == single.read_bytes()


def test_greedy_takes_the_most_likely_token_of_the_bare_model(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    """Against a loop without `generate`: neither padding nor the saved penalties play a part."""
    answered = read_rows(run(target, prompts, tmp_path / "out.jsonl", "--temperature", "0"))
    model = LlamaForCausalLM.from_pretrained(target).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    asked = read_prompts(prompts, ChatTemplate(tokenizer))
    for row, (ids, *_) in zip(answered, asked, strict=True):
        generated = []
        while len(generated) < 12 and generated[-1:] != [tokenizer.eos_token_id]:
            with torch.no_grad():
                logits = model(torch.tensor([ids + generated])).logits  # [1, s + t, v]
            generated.append(int(logits[0, -1].argmax()))
        assert row["messages"][-1]["content"] == tokenizer.decode(
            generated, skip_special_tokens=True
        )


def test_sampling_follows_the_plain_softmax(target: Path) -> None:
    """2000 first tokens at temperature 2 against the model's own probabilities."""
    model = LlamaForCausalLM.from_pretrained(target).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    ids = make_prompt(prompt("sun", "moon"), ChatTemplate(tokenizer)).input_ids
    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([ids])).logits[0, -1] / 2, dim=-1)  # [v]

    local = LocalTarget(target, tokenizer, temperature=2.0, max_new_tokens=1)
    answers = local.answer([ids] * 2000, seed=3)
    for word in WORDS:
        share = sum(answer.content == word for answer in answers) / 2000
        expected = float(probs[tokenizer.convert_tokens_to_ids(word)])
        assert abs(share - expected) < 4 * (expected / 2000) ** 0.5 + 1e-3, word


def test_seed_decides_the_answers(target: Path, prompts: Path, tmp_path: Path) -> None:
    first, again, other = (
        run(target, prompts, tmp_path / f"{name}.jsonl", "--seed", seed).read_bytes()
        for name, seed in (("first", "5"), ("again", "5"), ("other", "6"))
    )
    assert first == again
    assert first != other


# Resumption
@pytest.mark.parametrize("torn", [b"", b'{"0": {"content": "re'])
def test_a_killed_run_continues_to_the_same_file(
    target: Path, prompts: Path, tmp_path: Path, torn: bytes
) -> None:
    unbroken = run(target, prompts, tmp_path / "unbroken.jsonl")
    output, partial = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.partial"
    for lines in (2, 3):  # the settings and a batch; then one batch more
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
            kill_after(1, monkeypatch)
            run(target, prompts, output)
        assert not output.exists()
        assert len(partial.read_bytes().splitlines()) == lines
        with partial.open("ab") as file:
            file.write(torn)

    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_after(1, monkeypatch)  # of three batches, two are not made again
        run(target, prompts, output)
    assert output.read_bytes() == unbroken.read_bytes()
    assert not partial.exists()


def test_a_partial_file_of_other_settings_is_refused(
    target: Path, prompts: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.MonkeyPatch.context() as killing, pytest.raises(Killed):
        kill_after(1, killing)
        run(target, prompts, output)
    error = refusal(target, prompts, output, "--temperature", "0.5")
    assert "other settings (temperature 1.0 -> 0.5)" in error


def test_a_finished_output_is_not_overwritten(
    target: Path, prompts: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    output = write_lines(tmp_path / "out.jsonl", ["precious"])
    assert "exists already" in refusal(target, prompts, output)
    assert output.read_text() == "precious\n"


# Errors in the input
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not valid JSON: Expecting value"),
        ('["a list"]', "must be a JSON object"),
        ('{"conversations": []}', '"messages" must be a list'),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}', "must end with a user turn"),
        ('{"messages": [{"role": "critic", "content": "hi"}]}', "must end with a user turn"),
        ('{"messages": [{"content": "hi"}]}', 'message 0 .* "role"'),
        ('{"messages": [{"role": "user", "content": null}]}', 'message 0 .* "content"'),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogates not allowed"),
        (json.dumps({"id": "\ud800", **prompt("red")}), "surrogates not allowed"),
        (json.dumps(prompt("unspeakable")), "template refuses this chat: .* no such word"),
    ],
)
def test_a_malformed_line_is_named_before_the_model_is_loaded(
    target: Path, tmp_path: Path, refusal: Callable[..., str], line: str, message: str
) -> None:
    good = json.dumps(prompt("red"))
    source = write_lines(tmp_path / "prompts.jsonl", [good, "", line, good])  # a blank one counts
    error = refusal(target, source, tmp_path / "out.jsonl")
    assert re.search(rf"prompts\.jsonl:3: .*{message}", error)
    assert not list(tmp_path.glob("out*"))


def test_an_empty_or_absent_file_is_refused(
    target: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    empty = write_lines(tmp_path / "empty.jsonl", [])
    assert "at least one prompt" in refusal(target, empty, tmp_path / "out.jsonl")
    absent = tmp_path / "absent.jsonl"
    assert f"data file {absent} must exist" in refusal(target, absent, tmp_path / "out.jsonl")


def test_a_folder_that_is_no_target_is_refused(
    prompts: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    config = "must hold a config.json"
    assert config in refusal(tmp_path / "absent", prompts, tmp_path / "out.jsonl")
    (tmp_path / "bare").mkdir()
    assert config in refusal(tmp_path / "bare", prompts, tmp_path / "out.jsonl")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = "must hold the target's tokenizer"
    assert tokenizer in refusal(tmp_path / "bare", prompts, tmp_path / "out.jsonl")


def test_weights_of_another_model_are_refused(
    target: Path, prompts: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    other = Path(shutil.copytree(target, tmp_path / "other"))
    layers = json.loads((other / "config.json").read_text())["num_hidden_layers"]
    with_key(other / "config.json", "num_hidden_layers", layers + 1)
    error = refusal(other, prompts, tmp_path / "out.jsonl")
    assert f"num_hidden_layers is {layers + 1}" in error


def test_a_weight_that_is_missing_or_misshapen_is_refused(
    target: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for change, said in (
        (lambda weights: weights.pop(name), f"lacks 1 of the weights .*{name}"),
        (lambda weights: weights.update({name: weights[name].T.contiguous()}), "cannot load"),
    ):
        other = Path(shutil.copytree(target, tmp_path / "other", dirs_exist_ok=True))
        weights = load_file(other / "model.safetensors")
        change(weights)
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        capsys.readouterr()
        assert tool.main(arguments(other, prompts, tmp_path / "out.jsonl")) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(said, error), error


@pytest.mark.parametrize(
    "option", ["--temperature=-1", "--temperature=nan", "--max-new-tokens=0", "--batch-size=0"]
)
def test_an_option_out_of_range_is_refused(
    target: Path, prompts: Path, tmp_path: Path, refusal: Callable[..., str], option: str
) -> None:
    assert "must be" in refusal(target, prompts, tmp_path / "out.jsonl", option)


# Parts
def test_batches_hold_each_prompt_once_the_longest_first() -> None:
    prompts = [Prompt([0] * length, "") for length in (3, 9, 3, 7, 1)]
    assert local_target.plan_batches(prompts, batch_size=2) == [[1, 3], [0, 2], [4]]


def test_batch_seeds_are_those_of_the_quickstart() -> None:
    """Others would make another file of the same command."""
    assert [local_target.batch_seed(0, batch) for batch in range(2)] == [
        4440543551817394114,
        5337895739374401191,
    ]
