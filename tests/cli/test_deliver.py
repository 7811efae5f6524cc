"""`dspark export`, `import`, `convert`, `verify` and `served` on a tiny draft."""

import json

import pytest
import yaml

from dspark_megatron.cli.deliver.draft_options import LAYOUTS
from dspark_megatron.cli.exit_codes import BAD_INPUT, DONE, NOT_SOUND
from dspark_megatron.cli.main import main
from dspark_megatron.conversion.layouts import table
from dspark_megatron.storage import target_weights
from support.draft_folders import FINGERPRINT, write_checkpoint, write_target
from support.shapes import VANILLA


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run as training leaves it, with its config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(target_weights, "weights_fingerprint", lambda *_: FINGERPRINT)
    write_target(tmp_path / "target")
    run = write_checkpoint(tmp_path / "run", VANILLA)
    (run / "config.yaml").write_text(yaml.safe_dump({"target": {"path": "target"}}))
    return run


def as_json(capsys, *words):
    """Exit code and record of a command."""
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_names_of_layouts():
    assert tuple(table.LAYOUTS) == LAYOUTS


def test_a_run_is_all_that_an_export_needs(trained, capsys):
    for _ in range(2):
        assert main(["export", "run", "--skip-logits"]) == DONE
        said = capsys.readouterr().out
        assert "from run/config.yaml: --target target\n" in said and "SGLang: loads" in said
    assert (trained / "export" / "config.json").is_file()
    assert main(["verify", "run/export", "--run", "run", "--skip-logits", "--quiet"]) == DONE
    assert capsys.readouterr().out == ""
    code, record = as_json(capsys, "verify", "run/export", "run")
    assert code == DONE and record["sound"]
    draft, stored = record["folders"]
    assert draft["kind"] == "draft" and draft["layout"] == "hf" and draft["engines"][0]["loads"]
    assert stored["kind"] == "stored" and stored["files"][-1]["damage"] == ""


def test_the_record_of_an_export_says_what_it_was_made_of(trained, capsys):
    settings = {"target": {"path": "target", "checkpoint": "gpt", "provider": "megatron"}}
    (trained / "config.yaml").write_text(yaml.safe_dump(settings))
    code, record = as_json(capsys, "export", "run", "--skip-logits", "--no-shared-weights")
    assert code == DONE
    assert record["output"].endswith("run/export") and record["target"] == "target"
    assert record["target_checkpoint"] == "gpt"
    assert record["checkpoint"] == str(trained / "checkpoints" / "iter_0000100")


def test_there_and_back(trained, capsys):
    main(["export", "run/checkpoints", "--dtype", "fp32", "--skip-logits"])
    for _ in range(2):
        words = ["convert", "run/export", "--target", "target", "--layout", "modelopt"]
        code, record = as_json(capsys, *words, "--output", "m")
        assert code == DONE and record["layout"] == "modelopt"
        code, record = as_json(capsys, "import", "m", "--target", "target", "--output", "back")
        assert code == DONE and record["checkpoint"].endswith("back/checkpoints/iter_0000000")
        assert (record["target"], record["target_checkpoint"]) == ("target", None)


def test_what_is_not_sound_and_what_cannot_be_checked(trained, capsys):
    main(["export", "run", "--skip-logits"])
    other = write_target(trained.parent / "other", seed=2)
    code, record = as_json(capsys, "verify", "run/export", "--target", other)
    assert code == NOT_SOUND and "embed_tokens.weight" in record["folders"][0]["problems"][0]
    for words, message in (
        (["verify", "none"], "none is not a folder"),
        (["verify", "target"], "target"),
        (["verify", "run/export", "--run", "none"], "none is not a folder"),
        (["export", "none"], "none is not a folder"),
        (["export", "target"], "target/config.yaml is not there, so the target is not known"),
        (["export", "run", "--iteration", "7"], "no checkpoint of iteration 7"),
        (["import", "run/export", "--output", "x"], "give --target"),
        (["convert", "run/export", "--output", "x"], "give --target"),
    ):
        assert main(words) == BAD_INPUT, words
        assert message in capsys.readouterr().err


def test_served_lists_its_actions(capsys):
    assert main(["served"]) == DONE
    assert "served engines" in capsys.readouterr().out
    assert main(["served", "x"]) == BAD_INPUT
    assert "no command 'served x'" in capsys.readouterr().err
    code, record = as_json(capsys, "served", "engines", "--engine", "VLLM")
    assert code == DONE and record["engines"][0]["engine"] == "vLLM"
