"""Mistakes that a first hour brings, by command: each ends with code 2 and one sentence that names
what is wrong and the way out, before any rank starts and with nothing written."""

import shutil

import pytest

from dspark_megatron.cli.exit_codes import BAD_INPUT
from dspark_megatron.cli.main import main
from dspark_megatron.cli.train import ranks
from support.draft_folders import write_checkpoint, write_target
from support.shapes import VANILLA
from support.tiny_target import tiny_config

MISTAKES = {
    "no such command": "there is no command 'no'",
    "trian run.yaml": "there is no command 'trian'",
    "served mesure": "there is no command 'served mesure'",
    # train
    "train": "name its YAML file first",
    "train missing.yaml": "missing.yaml",
    "train empty.yaml": "target.path",
    "train list.yaml": "must hold sections",
    "train broken.yaml": "broken.yaml",
    "train run.yaml optimizer.learning_rate=1": "optimizer.lr",
    "train run.yaml optimiser.lr=1": "optimizer",
    "train run.yaml lr=1": "section.key=value",
    "train run.yaml optimizer.lr=fast": "optimizer.lr",
    "train run.yaml optimizer.lr=-1": "optimizer.lr (-1",
    "train run.yaml optimizer.schedule=cosinus": "cosine",
    "train run.yaml optimizer.name=adam": "adamw",
    "train run.yaml train.iterations=0": "train.iterations (0)",
    "train run.yaml train.iterations=1.5": "train.iterations",
    "train run.yaml train.dtype=float16": "train.dtype",
    "train run.yaml train.output_dir=": "train.output_dir",
    "train run.yaml model.block_size=0": "model.block_size (0)",
    "train run.yaml model.markov_rank=-1": "model.markov_rank (-1)",
    "train run.yaml model.markov_rank=0": "model.confidence_head_with_markov",
    "train run.yaml loss.terms.kl2=1": "kl",
    "train run.yaml loss.weighting.name=depace": "dpace",
    "train run.yaml loss.preset=papers": "paper",
    "train run.yaml parallel.tensor_parallel=0": "parallel.tensor_parallel (0)",
    "train run.yaml target.dtype=int8": "target.dtype",
    "train run.yaml data.max_length=0": "data.max_length (0)",
    "train run.yaml evaluate.every=5": "evaluate.heldout_files",
    "train run.yaml evaluate.weights=ema optimizer.ema_decay=2": "optimizer.ema_decay (2",
    "train run.yaml --gpus 0": "--gpus (0) must be > 0",
    "train run.yaml --gpus 2 --nodes 2": "--node-rank",
    "train run.yaml --gpus 2 --nodes 2 --node-rank 0 --rendezvous host": "HOST:PORT",
    "train run.yaml --nodes 2 --node-rank 2 --rendezvous host:1": "--node-rank (2)",
    # evaluate
    "evaluate": "nothing to evaluate with",
    "evaluate nowhere": "nowhere must be the folder of a draft or a run",
    "evaluate run run": "run is named twice",
    "evaluate run evaluate.temperature=-1": "evaluate.temperature (-1.0)",
    "evaluate run evaluate.scheduler=early_stopping": "evaluate.sps_table",
    "evaluate run export evaluate.untrained=true": "chooses one draft",
    # calibrate and report
    "calibrate": "name a run's folder",
    "calibrate run": "dspark evaluate",
    "calibrate run evaluate.temperature=0": "goes with --config",
    "report nowhere": "nowhere",
    "report run run": "run",
    "report run export": "--output is missing",
    # export, import, convert, verify
    "export nowhere": "nowhere",
    "export run --iteration 7": "iter_",
    "export run --iteration best": "best",
    "export run --weights ema": "moving average",
    "export run --target run.yaml": "run.yaml",
    "export export": "export",
    "import run --target target --output new": "run",
    "import nowhere --target target --output new": "nowhere",
    "import export --output new": "--target",
    "convert export --output new": "--target",
    "convert nowhere --target target --output new": "nowhere",
    "verify nowhere": "nowhere",
    # data, cache, generate, doctor, plan, served
    "data missing.yaml": "missing.yaml",
    "data run.yaml --held-out": "evaluate.heldout_files",
    "generate --target nowhere --input chats.jsonl --output new.jsonl": "nowhere",
    "generate --endpoint localhost --model x --input chats.jsonl --output new.jsonl": "http",
    "plan --target nowhere": "nowhere",
    "plan --target target --gpu h100 --nodes 0": "nodes (0)",
    "served measure run.yaml --output sps.json --rounds 0": "rounds",
    "served simulate --records no.safetensors --sps no.json --output new.json": "no.",
}
"""By what was typed: words of the answer."""


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    write_target(folder / "target")
    write_checkpoint(folder / "run", VANILLA)
    (folder / "run" / "config.yaml").write_text("target: {path: target}\n")
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "run.yaml").write_text(tiny_config(tiny_run).to_yaml())
    (folder / "empty.yaml").write_text("")
    (folder / "list.yaml").write_text("- target\n")
    (folder / "broken.yaml").write_text("target: {path: x\n")
    shutil.copy(tiny_run["data"]["train_files"][0], folder / "chats.jsonl")
    return folder


def everything(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_sentence(folder, monkeypatch, capsys, typed):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ranks, "start_ranks", lambda *_: pytest.fail("it started ranks"))
    before = everything(folder)
    try:
        code = main(typed.split())
    except SystemExit as error:  # the parser's own
        code = error.code
    said = capsys.readouterr()
    print(typed, code, said)
    assert code == BAD_INPUT
    last = said.err.strip().splitlines()[-1]
    assert "error: " in last and MISTAKES[typed] in last and len(last) < 700
    assert "Traceback" not in said.err and everything(folder) == before
