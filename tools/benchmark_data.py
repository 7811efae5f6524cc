"""Tokenizing a run's data: every rank into its own memory, against once into a store that all map.

    python tools/benchmark_data.py [--chats 200000 --tokens 500 --ranks 1 4]
    python tools/benchmark_data.py --chats 0 --second-start 1300000 --sample-tokens 2000

Chats are made up and tokenized by a BPE tokenizer trained on them (`--tokenizer` takes a folder).
The ranks of a node are processes that start at one moment; times are up to the last one. Memory is
what a rank holds beside its imports, once it has read `--read` samples: its own pages, and those of
mapped files, which ranks share. `--second-start` measures a start on a store of so many samples
(a sparse file): opened and checked, then the first step's samples drawn with and without grouping.
"""

import argparse
import itertools
import json
import multiprocessing
import random
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmarking
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dspark_megatron.config import LossConfig
from dspark_megatron.data.dataset import ConversationDataset, dataset_of, load_samples
from dspark_megatron.data.rules import DropReport, SampleRules
from dspark_megatron.data.sampler import StepSampler
from dspark_megatron.data.token_store import TokenStore, write_store
from dspark_megatron.data.tokenizing.collecting import Streams, Tokenizing
from dspark_megatron.data.tokenizing.encoding import LineEncoder

RULES = SampleRules(max_length=4096, min_loss_tokens=14, num_draft_tokens=7, loss=LossConfig())
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORMATS = {"ranks": "", "data": "", "seconds": ",.1f", "chats/s": ",.0f", "tokens/s": ",.0f"}
FORMATS |= {"second start, s": ".2f", "own MiB a rank": ",.0f", "mapped MiB": ",.0f"}
SECOND = {"samples": ",", "tokens": ",", "step": "", "seconds": ".2f", "own MiB": ",.0f"}
WORDS = 4000
"""Made-up ones, whose frequency falls as in a language."""


def make_chats(file: Path, count: int, tokens: int) -> None:
    """About so many tokens each, over two turns of a user and of the assistant."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucm", k=rng.randint(2, 9))) for _ in range(WORDS)]
    weights = [1 / (i + 10) for i in range(WORDS)]
    pool = rng.choices(words, weights, k=200_000)
    roles = ("user", 0.1), ("assistant", 0.4), ("user", 0.1), ("assistant", 0.4)
    with file.open("w", encoding="utf-8") as opened:
        for _ in range(count):
            length = rng.randint(tokens // 4, 2 * tokens - tokens // 4)
            messages = []
            for role, share in roles:
                size = max(12, int(share * length))
                start = rng.randrange(len(pool) - size)
                messages.append({"role": role, "content": " ".join(pool[start : start + size])})
            opened.write(json.dumps({"messages": messages}) + "\n")


def train_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """On the first chats, so that most words are one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    with file.open(encoding="utf-8") as opened:
        backend.train_from_iterator(itertools.islice(opened, 1000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def rank_main(rank: int, plan: dict[str, Any], barrier: Any, results: Any) -> None:
    """A rank's whole life in one variant. The first result is its time, the second its memory."""
    torch.set_num_threads(1)
    encoder = LineEncoder(plan["tokenizer"], len(plan["tokenizer"]), RULES)
    own, mapped = memory()
    barrier.wait()
    start = time.perf_counter()
    if plan["store"] is None:
        dataset = load_samples([plan["file"]], encoder._tokenizer, encoder._vocab_size, RULES)
    else:
        if rank == 0:
            work = Tokenizing([plan["file"]], encoder, workers=plan["workers"])
            for _ in write_store(plan["store"], {}, work):
                pass
        barrier.wait()
        dataset = opened(plan["store"], plan["file"])
    fingerprint = dataset.fingerprint
    first = time.perf_counter() - start
    barrier.wait()
    start = time.perf_counter()
    if plan["store"] is not None:
        dataset = opened(plan["store"], plan["file"])
    again = time.perf_counter() - start
    rng = random.Random(rank)
    for _ in range(plan["read"]):
        dataset[rng.randrange(len(dataset))]
    now, now_mapped = memory()
    tokens = dataset.report.total_tokens
    results.put((first, again, now - own, now_mapped - mapped, fingerprint, tokens))
    barrier.wait()  # memory counts as shared while others live


def memory() -> tuple[int, int]:
    """Bytes of anonymous pages, which are this process's own, and of files that are mapped."""
    found = psutil.Process().memory_info()
    return found.rss - found.shared, found.shared


def opened(folder: Path, file: Path) -> ConversationDataset:
    store = TokenStore.open(folder, {})
    assert store is not None, "it was written just now"
    dataset = dataset_of(store.samples, [file], RULES)
    dataset.fingerprint = str(store.fingerprint(None))
    return dataset


def measure(file: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each number of ranks and each way; the samples of all must be the same."""
    if args.tokenizer is None:
        tokenizer = train_tokenizer(file)
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            args.tokenizer, local_files_only=True, trust_remote_code=False
        )
    fingerprints = set()
    for ranks in args.ranks:
        for way in ("every rank in memory", "one store for all"):
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                store = Path(folder) if way.startswith("one") else None
                plan = {"tokenizer": tokenizer, "file": file, "store": store}
                plan |= {"workers": args.workers, "read": args.read}
                found = run_ranks(ranks, plan)
            first, again, own, mapped = (max(one[i] for one in found) for i in range(4))
            fingerprints |= {one[4] for one in found}
            yield {
                "ranks": str(ranks),
                "data": way,
                "seconds": first,
                "chats/s": args.chats / first,
                "tokens/s": found[0][5] / first,
                "second start, s": again if store is not None else first,
                "own MiB a rank": own / benchmarking.MIB,
                "mapped MiB": mapped / benchmarking.MIB,
            }
    assert len(fingerprints) == 1, "all ways must make the same samples"


def run_ranks(ranks: int, plan: dict[str, Any]) -> list[tuple]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(ranks), context.Queue()
    processes = [
        context.Process(target=rank_main, args=(rank, plan, barrier, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


class EqualSamples:
    """What makes a store of many samples of equal length without writing their tokens."""

    files: list = []

    def __init__(self, samples: int, tokens: int) -> None:
        self._samples, self._tokens = samples, tokens
        total = samples * tokens
        self.report = DropReport(kept=samples, total_tokens=total, loss_tokens=total, lines=samples)
        self.starts, self.sizes = [0], [samples]

    def into(self, streams: Streams) -> Iterator[None]:
        total = self._samples * self._tokens
        for stream, size in ((streams.token_ids, 4 * total), (streams.loss_mask, total)):
            stream.seek(size - 1, 1)
            stream.write(b"\0")
        offsets = range(0, total + 1, self._tokens)
        streams.offsets.write(array("q", offsets).tobytes())
        streams.lines.write(array("q", range(1, self._samples + 1)).tobytes())
        yield


def second_start(folder: Path, samples: int, tokens: int) -> Iterator[dict[str, Any]]:
    """A row for what a start does, in its order."""
    work: Any = EqualSamples(samples, tokens)
    for _ in write_store(folder, {}, work):
        pass
    about = {"samples": samples, "tokens": samples * tokens}
    own, _ = memory()
    start = time.perf_counter()
    dataset = opened(folder, folder)
    yield {**about, **since("the store is opened and checked", start, own)}
    for grouped in (False, True):
        start = time.perf_counter()
        lengths = dataset.lengths if grouped else None
        sampler = StepSampler(len(dataset), 1, 512, 4, 0, 1, lengths=lengths)
        for batch in sampler.micro_batches(samples - 100):  # over the end of an epoch
            for ref in batch:
                dataset[ref.sample_index]
        name = "grouped by length" if grouped else "as they come"
        yield {**about, **since(f"512 samples are drawn, {name}", start, own)}


def since(name: str, start: float, own: int) -> dict[str, Any]:
    seconds, (now, _) = time.perf_counter() - start, memory()
    return {"step": name, "seconds": seconds, "own MiB": (now - own) / benchmarking.MIB}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how a run's data are tokenized.")
    parser.add_argument("--chats", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=500, help="of a chat, about")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="on the node")
    parser.add_argument("--workers", type=int, help="processes that fill the store")
    parser.add_argument("--read", type=int, default=2000, help="samples that a rank reads")
    parser.add_argument("--tokenizer", type=Path, help="folder; null: one is trained")
    parser.add_argument("--second-start", type=int, default=0, metavar="SAMPLES")
    parser.add_argument("--sample-tokens", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="for files; null: that of temporary files")
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    tables: benchmarking.Tables = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.chats:
            file = Path(folder) / "chats.jsonl"
            make_chats(file, args.chats, args.tokens)
            size = file.stat().st_size / benchmarking.MIB
            title = f"{args.chats:,} chats, {size:,.0f} MiB of JSONL"
            tables[title] = (list(measure(file, args)), FORMATS)
        if args.second_start:
            store = Path(folder) / "store"
            store.mkdir()
            rows = list(second_start(store, args.second_start, args.sample_tokens))
            tables["a start on a store that is there"] = (rows, SECOND)
    print(benchmarking.report(tables, torch.device("cpu"), args.json))


if __name__ == "__main__":
    main()
