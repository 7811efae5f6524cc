"""No code of a model's folder is run, and nobody is asked whether it may be."""

import ast
import contextlib
import io
import json
import sys
from functools import partial

import pytest

from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.run.check import check
from support.paths import ROOT
from support.tiny_target import make_target, tiny_config

LOADERS = {"from_pretrained", "from_config"}
WITHOUT_CODE = {"AutoHfQuantizer", "PreTrainedTokenizerFast", "layout", "Draft", "Target"}
"""Receivers of such calls that have no code to run; the last two are this project's own."""


def unguarded(source: str) -> list[int]:
    """Lines of calls that load by a folder's config and do not forbid its code."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        receiver = ast.unparse(node.func.value).rpartition(".")[2]
        if node.func.attr not in LOADERS or receiver in WITHOUT_CODE:
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if given.get("trust_remote_code") != "False":
            lines.append(node.lineno)
    return lines


def test_the_search_sees_a_call_without_the_argument():
    assert unguarded("AutoModel.from_config(config)\nAutoConfig.from_pretrained(path)") == [1, 2]
    assert not unguarded("AutoModel.from_config(config, trust_remote_code=False)")


@pytest.mark.parametrize("room", ["dspark_megatron", "tools", "examples"])
def test_every_call_of_transformers_forbids_code_of_the_folder(room):
    for path in (ROOT / room).rglob("*.py"):
        assert not unguarded(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


PAYLOAD = "open({place!r}, 'w').write('ran')\nclass Own: pass\n"
"""Of a file that a config's auto_map names."""
ALL_CLASSES = "AutoConfig AutoModel AutoModelForCausalLM AutoTokenizer".split()


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        # Transformers has the config's class of the second, and no model for it: there it asks.
        ("own", "only code in the folder"),
        ("qwen2_5_omni_text", "Transformers has no base model for a target of model_type"),
        ("qwen3", ""),
    ],
)
def test_a_payload_does_not_run_whatever_the_terminal_says(
    tmp_path, tiny_run, monkeypatch, model_type, sentence
):
    folder, ran = make_target(tmp_path / "target"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {name: "payload.Own" for name in ALL_CLASSES}
    config["model_type"] = model_type
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["payload.Own", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "payload.py").write_text(PAYLOAD.format(place=str(ran)))
    answers = io.StringIO("yes\n" * 100)
    monkeypatch.setattr(sys, "stdin", answers)
    # Eager attention is not looked up in the class, and a split builds the model from its config.
    settings = tiny_config(
        tiny_run,
        target={"path": str(folder), "attention": "eager"},
        parallel={"tensor_parallel": 2},
    )
    for command in (partial(check, settings, 2, use="train"), partial(describe_run, settings, 2)):
        with pytest.raises(ConfigError, match=sentence) if sentence else contextlib.nullcontext():
            command()
    assert not ran.exists() and answers.tell() == 0
