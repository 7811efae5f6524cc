"""The benchmark of tokenizing measures what it says."""

import benchmark_data
import pytest

from dspark_megatron.data.dataset import load_samples


def test_chats_have_about_the_tokens_that_are_asked_for(tmp_path):
    file = tmp_path / "chats.jsonl"
    benchmark_data.make_chats(file, 40, 200)
    tokenizer = benchmark_data.train_tokenizer(file)
    data = load_samples([file], tokenizer, len(tokenizer), benchmark_data.RULES)
    assert len(data) == 40 and 150 < data.lengths.double().mean() < 300


def test_a_second_start_opens_what_looks_like_a_store_of_that_size(tmp_path):
    rows = list(benchmark_data.second_start(tmp_path, 700, 50))
    assert [row["samples"] for row in rows] == [700] * 3 and rows[0]["tokens"] == 35_000
    assert benchmark_data.opened(tmp_path, tmp_path)[699].input_ids.tolist() == [0] * 50


def test_ways_that_make_other_samples_are_no_comparison(tmp_path, monkeypatch):
    file = tmp_path / "chats.jsonl"
    benchmark_data.make_chats(file, 10, 50)
    args = benchmark_data.parse_arguments(["--chats", "10", "--ranks", "1"])
    for same in (True, False):
        prints = iter(["a", "a" if same else "b"])
        found = lambda ranks, plan, prints=prints: [(1.0, 0.5, 2**20, 0, next(prints), 500)]  # noqa: E731
        monkeypatch.setattr(benchmark_data, "run_ranks", found)
        if same:
            rows = list(benchmark_data.measure(file, args))
            assert [row["second start, s"] for row in rows] == [1.0, 0.5]
        else:
            with pytest.raises(AssertionError, match="must make the same samples"):
                list(benchmark_data.measure(file, args))
