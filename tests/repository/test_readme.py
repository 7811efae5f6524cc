"""Every command of the README, run twice in one folder on a tiny target, in this process.

The second round meets what the first has left: a finished run, earlier results, exports.
"""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import yaml

from support.chat_lines import prompt, write_lines
from support.chat_server import KEY, Server
from support.paths import ROOT
from support.tiny_target import VOCAB_SIZE, make_chats, tiny_config
from support.tiny_tokenizer import tiny_tokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACES = {
    "RUN": "runs/tiny",
    "TARGET": "target",
    "NAME": "tiny",
}
"""Words of the README as they are here; other words stay."""
MASK = tiny_tokenizer(VOCAB_SIZE).mask_token_id
CHANGES = {
    "make quickstart": {},
    "make test": None,  # is running
    'pip install ".[data]"': None,  # test_package.py installs the wheel
    "dspark plan --target TARGET --data chats.jsonl --gpu h100 --output planned.yaml": {
        "add": f"model.mask_token_id={MASK} model.target_layer_ids=[0,2]"
    },
    "dspark train run.yaml --gpus 8 [section.key=value ...]": {
        "add": "--dry-run",
        "then": "train.tensorboard=false",
    },
    "dspark evaluate run.yaml --gpus 8 [section.key=value ...]": {
        "add": "evaluate.records=drafts.safetensors"
    },
    "dspark evaluate DRAFT RUN --target TARGET --prompts chat maths code --gpus 8": {
        "places": {"DRAFT": "runs/tiny/export", "code": "prompts.jsonl"},
        "add": "evaluate.max_prompts=1 evaluate.max_new_tokens=2",
    },
    "dspark doctor --gpus 8": None,  # tests/cli/test_doctor.py
    "dspark report RUN": {},
    "dspark cache run.yaml --gpus 8 --output STATES": {},
    "dspark export RUN": {"add": "--force"},
    "dspark import DRAFT --target TARGET --output RUN": {
        "places": {"DRAFT": "runs/tiny/export", "RUN": "imported"}
    },
    "dspark convert DRAFT --target TARGET --output DIR --layout specforge": {
        "places": {"DRAFT": "runs/tiny/export", "DIR": "specforge"}
    },
    "dspark verify DIR": {"places": {"DIR": "runs/tiny/export"}},
    "dspark generate --target TARGET --input prompts.jsonl --output answers.jsonl": {
        "add": "--max-new-tokens 2",
        "again": "answers.jsonl exists already; delete it or choose another --output",
    },
    "dspark generate --endpoint URL --model NAME --input prompts.jsonl --output answers.jsonl": {
        "places": {"answers.jsonl": "served.jsonl"},
        "again": "served.jsonl exists already; delete it or choose another --output",
    },
    "dspark data run.yaml": {},
    "dspark calibrate --records drafts.safetensors --output RUN": {},
    "dspark served measure run.yaml --gpus 8 --output sps.json": {
        "add": "--batch-tokens 1 32 --rounds 1 --context-length 8"
    },
    "dspark served simulate --records drafts.safetensors --sps sps.json "
    "--output serving.json --requests 1 2 4 8": {"add": "--interpolate"},
}
"""What each command needs to be quick. `places`: words of this one; `add`: arguments; `then`: those
of another run; `again`: how a second run is refused."""


def readme_commands():
    """Lines of code blocks that begin as commands, comments aside."""
    blocks = README.split("```")[1::2]
    lines = (line.partition("#")[0].strip() for block in blocks for line in block.splitlines())
    return [
        line
        for line in lines
        if line.startswith(("make ", "torchrun ", "python ", "dspark ", "pip "))
    ]


def test_the_table_has_every_command_of_the_readme():
    assert set(readme_commands()) == CHANGES.keys()


@pytest.fixture
def place(tiny_run, tmp_path, monkeypatch):
    """A folder with a target, data, a run's YAML and a server, in which commands are run."""
    from dspark_megatron.run.ranks import ending

    quickstart = tmp_path / "examples" / "quickstart"
    for target in (tmp_path / "target", tmp_path / "runs" / "quickstart" / "target"):
        shutil.copytree(tiny_run["target"]["path"], target)
    quickstart.mkdir(parents=True)
    for chats in (tmp_path / "chats.jsonl", quickstart / "train.jsonl"):
        make_chats(chats, 8)
    lines = [
        json.dumps(prompt(text)) for text in ("hello", "the hill", "inn well", "then all bells")
    ]
    for prompts in (tmp_path / "prompts.jsonl", quickstart / "heldout.jsonl"):
        write_lines(prompts, lines)

    own = yaml.safe_load((ROOT / "examples/quickstart/quickstart.yaml").read_text())
    write_run(quickstart / "quickstart.yaml", tiny_run, own)
    names = {"train_files": ["chats.jsonl"]}, {"prompt_files": ["prompts.jsonl"]}
    data, evaluate = names
    train = {"output_dir": "runs/tiny"}
    sections = {"target": {"path": "target"}, "data": data, "train": train, "evaluate": evaluate}
    write_run(tmp_path / "run.yaml", tiny_run, sections)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(ending.os, "_exit", sys.exit)  # it ends the whole process
    return tmp_path


def write_run(path, tiny_run, sections):
    """A YAML whose paths are those of the sections, and all else is tiny."""
    kept = {"path", "train_files", "output_dir", "prompt_files", "temperature"}
    paths = {s: {k: v for k, v in keys.items() if k in kept} for s, keys in sections.items()}
    paths["train"] |= {"iterations": 2, "global_batch_size": 2}
    paths["evaluate"] |= {"max_new_tokens": 12}
    path.write_text(tiny_config(tiny_run, **paths).to_yaml())


def run_here(words):
    """A command as one rank, in this process: its exit code and what it printed."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = exit_code(program_of(words))
    return code, said.getvalue()


def program_of(words):
    """What Python runs. A command that would start ranks is one here."""
    if words[0] == "python":
        return words[1:]
    if words[0] == "dspark":
        named = shlex.join(words[1:]).replace("--gpus 8", "--as-rank")
        return ["dspark_megatron", *shlex.split(named)]
    return words[4:] if words[3] == "-m" else words[3:]


def exit_code(words):
    before = sys.argv
    words = words[1:] if words[0] == "-m" else words
    sys.argv = words
    try:
        if words[0].endswith(".py"):
            script = ROOT / words[0]
            with mock.patch.object(sys, "path", [str(script.parent), *sys.path]):
                runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return error.code or 0
    finally:
        sys.argv = before
    return 0


def run_quickstart(monkeypatch):
    """The example's own order of commands."""
    example = runpy.run_path(str(ROOT / "examples/quickstart/quickstart.py"))

    def run(*command):
        code, said = run_here(list(command))
        assert code == 0, f"{' '.join(command)}\n{said}"
        return 0.0

    variables = example["main"].__globals__
    monkeypatch.setitem(variables, "run", run)
    monkeypatch.setitem(variables, "ROOT", Path.cwd())
    example["main"]([])


def words_of(line, change, url, extra):
    plain = re.sub(r"\[.*?\]", "", line)
    places = {"URL": url, **PLACES, **change.get("places", {})}
    return [places.get(word, word) for word in shlex.split(f"{plain} {extra}")]


@pytest.mark.slow
def test_every_command_of_the_readme_works_twice_in_one_folder(place, monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for is_second in (False, True):
        for line in dict.fromkeys(readme_commands()):
            change = CHANGES[line]
            if line == "make quickstart":
                run_quickstart(monkeypatch)
                continue
            for key in [key for key in ("add", "then") if change is not None and key in change]:
                check(line, change, words_of(line, change, server.url, change[key]), is_second)
            if change is not None and not {"add", "then"} & change.keys():
                check(line, change, words_of(line, change, server.url, ""), is_second)
    server.shutdown()
    for run, card in (("tiny", "runs/tiny/export"), ("quickstart", "runs/quickstart/export")):
        assert (place / "runs" / run / "run_status").read_text() == "completed\n"
        tau = re.search(r"\| 4 \| (\d\.\d{3}) \|", (place / card / "README.md").read_text())
        assert 1 <= float(tau[1]) <= 4
    page = (place / "runs/quickstart/report.html").read_text()
    assert "heldout.jsonl" in page and "untrained tau" in page


def check(line, change, words, is_second):
    code, said = run_here(words)
    refusal = change.get("again") if is_second else None
    assert (code == 0) == (refusal is None), f"{line}\n{said}"
    assert refusal is None or refusal in said


SCRIPTS = [
    path for folder in ("tools", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
]
COMMANDS = [
    str(path.relative_to(ROOT))
    for path in SCRIPTS
    if '"__main__"' in path.read_text(encoding="utf-8")
    and path.parent.name != "megatron_lm"  # its parser is Megatron-LM's
]


@pytest.mark.parametrize("script", COMMANDS)
def test_every_script_helps(script, monkeypatch):
    """And starts nothing, whatever its name promises."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it started a command"))
    code, said = run_here(["python", script, "--help"])
    assert code == 0 and "usage:" in said
