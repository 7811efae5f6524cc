"""Several processes that tokenize give what one gives, in its order and words."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dspark_megatron.data.dataset import load_samples
from dspark_megatron.data.files.sources import find_files
from dspark_megatron.data.tokenizing import batches as batches_module
from dspark_megatron.data.tokenizing import workers as workers_module
from dspark_megatron.data.tokenizing.batches import line_batches
from dspark_megatron.data.tokenizing.encoding import LineEncoder
from dspark_megatron.data.tokenizing.workers import chosen_workers, encoded_batches
from dspark_megatron.errors import ConfigError
from support.chat_lines import chat, talk, tokens
from support.samples import FORGETTING_TEMPLATE, VOCAB_SIZE, sample_rules
from support.tiny_tokenizer import tiny_tokenizer

THINKING = "<think>well</think>hello there then"


def lines_of_all_kinds(count):
    rng = random.Random(0)
    kinds = [
        lambda: json.dumps(chat("hi", "the hill " * rng.randint(1, 9))),
        lambda: json.dumps(talk("hi", THINKING, "hi", THINKING + " bell" * rng.randint(0, 9))),
        lambda: json.dumps(tokens([rng.randint(1, 300) for _ in range(9)], [0] + [1] * 8)),
        lambda: "{",
        lambda: json.dumps(chat("hi")),
        lambda: "",
    ]
    return "\n".join(rng.choices(kinds, [9, 4, 4, 1, 1, 1])[0]() for _ in range(count)).encode()


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "_MOST_LINES", 16)
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = FORGETTING_TEMPLATE

    def load(files, workers, **rules):
        rules = sample_rules(24, 2, reasoning_tags=("<think>", "</think>"), **rules)
        return load_samples(files, tokenizer, VOCAB_SIZE, rules, workers=workers)

    return load


def test_two_processes_make_the_same_samples_and_report(load, tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.json")]
    for file in files[:2]:
        file.write_bytes(lines_of_all_kinds(200))
    files[2].write_text(json.dumps([chat("hi", "all in the inn"), 3, tokens([1] * 5, [1] * 5)]))
    one, two = (load(files, workers, skip_bad_lines=0.5) for workers in (0, 2))
    assert one.fingerprint == two.fingerprint and len(one) > 200
    assert one.report.describe() == two.report.describe()
    assert "split by turns" in one.report.describe() and "left out" in one.report.describe()
    assert [one.origins[i] for i in range(len(one))] == [two.origins[i] for i in range(len(two))]


def test_the_reading_ends_early_in_the_same_words(load, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"messages": []}\n{\n' * 700)
    said = []
    for workers in (0, 2):
        with pytest.raises(ConfigError, match="1,000 of 1,000 lines cannot be used") as error:
            load([file], workers)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_bad_lines_before_a_damaged_place_come_first(load, tmp_path):
    packed = gzip.compress(b"3\n" + b"{\n" * 4000 + os.urandom(1 << 16))
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(packed[:-100])
    for workers in (0, 2):
        with pytest.raises(ConfigError, match="1,000 of 1,000 lines"):
            load([file], workers)
        with pytest.raises(ConfigError, match="is damaged or cut short"):
            load([file], workers, skip_bad_lines=0.5)


def children():
    return psutil.Process().children(recursive=True)


def test_a_process_that_dies_is_one_sentence(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines_of_all_kinds(4000))
    monkeypatch.setattr(batches_module, "_MOST_LINES", 8)
    encoder = LineEncoder(tiny_tokenizer(VOCAB_SIZE), VOCAB_SIZE, sample_rules(24, 2))
    work = encoded_batches(line_batches(find_files(file), None), encoder, 2)
    before = {child.pid for child in children()}
    with pytest.raises(ConfigError, match="one of 2 processes that tokenize .* has ended") as error:
        for number, _ in enumerate(work):
            if number == 2:
                new = psutil.Process().children(recursive=True)
                victim = next(
                    child for child in new if child.pid not in before and not child.children()
                )
                victim.send_signal(signal.SIGKILL)
    assert "data.tokenize_workers is 2 here" in str(error.value)


def test_processes_end_with_the_one_that_started_them_and_not_by_its_signals(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines_of_all_kinds(20))
    process = subprocess.Popen(
        [sys.executable, __file__, str(file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "at work\n"
    started = psutil.Process(process.pid).children(recursive=True)
    assert len([child for child in started if not child.children()]) >= 2
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun does; who started them answers it
    assert process.stdout.readline().endswith(" batches\n")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    while any(child.is_running() and child.status() != "zombie" for child in started):
        assert time.monotonic() < deadline, "they wait for work for ever"
        time.sleep(0.1)


def be_killed(file):
    """Run by the test above."""
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    encoder = LineEncoder(tiny_tokenizer(VOCAB_SIZE), VOCAB_SIZE, sample_rules(24, 2))
    batches_module._MOST_LINES = 1
    work = encoded_batches(line_batches(find_files(file), None), encoder, 2)
    next(work)
    print("at work", flush=True)
    while not told:
        time.sleep(0.01)
    time.sleep(0.5)
    print(1 + sum(1 for _ in work), "batches", flush=True)
    time.sleep(60)


def test_a_tokenizer_that_cannot_be_sent_is_said(tmp_path):
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.own = lambda: None
    encoder = LineEncoder(tokenizer, VOCAB_SIZE, sample_rules(24, 2))
    with pytest.raises(ConfigError, match="cannot be sent to other processes .*workers=0"):
        next(encoded_batches(iter([]), encoder, 2))


def test_the_number_of_processes_goes_by_size_and_cores(monkeypatch):
    monkeypatch.setattr(workers_module.os, "sched_getaffinity", lambda _: set(range(96)))
    assert chosen_workers(None, 2**20) == 0
    assert chosen_workers(None, 2**30) == 32
    assert chosen_workers(5, 2**20) == 5
    monkeypatch.setattr(workers_module.os, "sched_getaffinity", lambda _: {3})
    assert chosen_workers(None, 2**30) == 1


if __name__ == "__main__":
    be_killed(sys.argv[1])
