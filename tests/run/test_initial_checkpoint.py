"""A run that starts from weights: another run's, an import's, or a draft folder's of any layout."""

import shutil

import convert_checkpoint
import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.import_draft import import_folder
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.storage.target_folder import target_fingerprint
from support.tiny_target import make_target, tiny_config
from support.tool_runs import run_python
from support.training_runs import assert_same_curve, curve, run_training


@pytest.fixture(scope="module")
def first(pool, tiny_run, tmp_path_factory):
    """Six steps at two ranks."""
    run = tmp_path_factory.mktemp("first")
    train = {"output_dir": str(run), "iterations": 6}
    config = tiny_config(tiny_run, train=train, parallel={"tensor_parallel": 2})
    pool.run(run_training, world=2, tp=2, config=config)
    return run


@pytest.fixture(scope="module")
def starts(first, tiny_run, tmp_path_factory):
    """The same weights in every form that a run can start from."""
    target, folder = tiny_run["target"]["path"], tmp_path_factory.mktemp("starts")
    made = {"run": first}
    for layout in ("hf", "speculators", "modelopt", "specforge"):
        options = WriteOptions(layout, dtype=torch.float32)
        made[layout] = export_checkpoint(first, target, folder / layout, options)
    made["import"] = folder / "imported"
    import_folder(made["modelopt"], target, made["import"], fingerprint=target_fingerprint)
    return made


def start_from(pool, tiny_run, output, path, tp=1, world=None, **sections):
    sections["train"] = {
        "output_dir": str(output),
        "iterations": 3,
        "initial_checkpoint": str(path),
        **sections.get("train", {}),
    }
    config = tiny_config(tiny_run, parallel={"tensor_parallel": tp}, **sections)
    pool.run(run_training, world=world or tp, tp=tp, config=config)
    return curve(output)


@pytest.fixture(scope="module")
def expected(pool, tiny_run, starts, tmp_path_factory):
    return start_from(pool, tiny_run, tmp_path_factory.mktemp("e"), starts["run"])


@pytest.mark.parametrize(
    "form, tp, world",
    [
        ("run", 4, 4),
        ("import", 1, 1),
        ("import", 2, 4),
        ("hf", 1, 1),
        ("hf", 4, 4),
        ("modelopt", 2, 2),
        ("speculators", 2, 4),
        ("specforge", 1, 2),
    ],
)
def test_every_form_gives_the_same_curve(
    pool, tiny_run, starts, expected, tmp_path, form, tp, world
):
    assert_same_curve(start_from(pool, tiny_run, tmp_path, starts[form], tp, world), expected)


def test_it_starts_where_the_other_run_stood(first, expected):
    assert expected[0]["iteration"] == 1 and expected[0]["learning_rate"] < 1e-2
    assert expected[0]["loss"] < 0.9 * curve(first)[0]["loss"]


def test_a_run_that_continues_does_not_look_at_it(pool, tiny_run, starts, tmp_path):
    start_from(pool, tiny_run, tmp_path, starts["hf"])
    more = {"iterations": 4}
    rows = start_from(pool, tiny_run, tmp_path, tmp_path / "gone by now", train=more)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]


def test_another_block_size_may_start_from_it(pool, tiny_run, starts, tmp_path):
    rows = start_from(pool, tiny_run, tmp_path, starts["hf"], model={"block_size": 4})
    assert len(rows[0]["accept_rate"]) == 4


@pytest.mark.parametrize(
    "form, sections, message",
    [
        ("hf", {"model": {"markov_rank": 4}}, r"markov_rank \(8 there, 4 here\)"),
        ("run", {"model": {"target_layer_ids": [1, 2]}}, r"\[0, 2\] there, \[1, 2\] here"),
        (
            "hf",
            {"model": {"sample_from_anchor": False}},
            r"sample_from_anchor \(true there, false here\), which shifts what every slot drafts",
        ),
        (
            "run",
            {"model": {"attention": {"window": 8, "causal": "all"}}},
            r"model.attention.window \(null there, 8 here\), model.attention.causal \(none there, "
            r"all here\); set the model section",
        ),
        ("run", {"model": {"num_layers": 3}}, r"num_layers \(2 there, 3 here\); set the model"),
    ],
)
def test_another_draft_is_refused_before_any_work(tiny_run, starts, form, sections, message):
    train = {"initial_checkpoint": str(starts[form])}
    with pytest.raises(ConfigError, match=message):
        describe_run(tiny_config(tiny_run, train=train, **sections), world_size=1)


def test_what_the_target_gives_is_not_to_be_set(tiny_run, starts, tmp_path):
    target = make_target(tmp_path / "wide", hidden_size=64)
    sections = {"target": {"path": str(target)}, "train": {"initial_checkpoint": str(starts["hf"])}}
    with pytest.raises(ConfigError, match="the target gives hidden_size, so use the one"):
        describe_run(tiny_config(tiny_run, **sections), world_size=1)


def refuse(pool, tiny_run, tmp_path, path, message, **sections):
    with pytest.raises(AssertionError, match=message):
        start_from(pool, tiny_run, tmp_path / "output", path, **sections)


def test_a_draft_of_another_target_is_refused(pool, tiny_run, starts, tmp_path):
    """Of the same shape, so that only its weights tell."""
    other = {"path": str(make_target(tmp_path / "other", seed=1))}
    for form, message in (
        ("hf", "embed_tokens.weight differs from its source"),
        ("run", "was trained for another target .fingerprint"),
        ("import", "export the draft with --no-shared-weights"),
    ):
        refuse(pool, tiny_run, tmp_path, starts[form], message, target=other)
    start_from(pool, tiny_run, tmp_path / "over", starts["specforge"], target=other)


def test_values_that_are_not_finite_are_refused(pool, tiny_run, starts, tmp_path):
    folder = shutil.copytree(starts["hf"], tmp_path / "draft")
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.weight"][0, :3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refuse(pool, tiny_run, tmp_path, folder, "fc.weight has 3 values that are not finite")


def test_what_is_no_folder_is_refused(tiny_run):
    config = tiny_config(tiny_run, train={"initial_checkpoint": "no/such/run"})
    with pytest.raises(ConfigError, match="no/such/run is not a folder; give a run"):
        describe_run(config, world_size=1)


def test_an_import_is_no_run_to_continue(pool, tiny_run, starts):
    config = tiny_config(tiny_run, train={"output_dir": str(starts["import"])})
    with pytest.raises(AssertionError, match="set train.initial_checkpoint to it"):
        pool.run(run_training, world=1, tp=1, config=config)


IN_A_POD = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}
"""What a launcher leaves in the environment; the tool is a job of its own all the same."""


def convert(*arguments):
    return run_python("tools/convert_checkpoint.py", *arguments, **IN_A_POD, MASTER_PORT="29999")


def differences(output):
    """The largest differences that a comparison of logits printed."""
    lines = [line for line in output.splitlines() if "largest difference" in line]
    assert [line.split()[0] for line in lines] == ["logits", "confidence"], output
    return [float(line.split("checkpoint's ")[1].split(",")[0]) for line in lines]


def test_the_command_compares_logits(tiny_run, first, tmp_path, capsys):
    target = tiny_run["target"]["path"]
    out, common = tmp_path / "dspark", ("--checkpoint", first, "--target", target)
    code, output = convert("export", *common, "--output", out, "--dtype", "fp32")
    assert code == 0 and differences(output) == [0.0, 0.0]
    assert "SGLang: loads" in output
    code, output = convert("convert", "--input", out, "--target", target, "--layout", "modelopt",
                           "--output", tmp_path / "m", "--dtype", "bf16")  # fmt: skip
    assert code == 0 and "vLLM: does not load" in output
    code, output = convert("import", "--input", tmp_path / "m", "--target", target,
                           "--output", tmp_path / "back", "--tensor-parallel", 2)  # fmt: skip
    assert code == 0 and "train.initial_checkpoint" in output
    code, output = convert("export", "--checkpoint", tmp_path / "back", "--target", target,
                           "--output", tmp_path / "rounded", "--dtype", "fp32")  # fmt: skip
    assert code == 0 and differences(output) == [0.0, 0.0]
    # What `verify` prints needs no job's environment.
    assert convert_checkpoint.main(["verify", "--input", str(tmp_path / "m")]) == 0
    assert "layout modelopt" in capsys.readouterr().out
    assert convert_checkpoint.main(["verify", "--input", str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no DSpark draft" in error
