"""What evaluation asks for, and that it does not speak of a decoder that loses something."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dspark_megatron.config.loading import load_config
from dspark_megatron.conversion.import_draft import import_folder
from dspark_megatron.conversion.layouts.hf_config import DraftDescription, hugging_face_config
from dspark_megatron.conversion.layouts.names import hugging_face_shapes
from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.run.known_draft import evaluated_draft, with_draft_of
from dspark_megatron.shape import draft_shape
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.storage.target_weights import weights_fingerprint
from support.chat_lines import write_jsonl
from support.tiny_target import tiny_config
from support.training_runs import finish, launch, write_config

PROMPTS = ["hello", "the hill in the"]
OWN = {
    "block_size": 4,
    "markov_head_type": "gated",
    "ffn_hidden_size": 40,
    "num_key_value_heads": 2,
    "enable_confidence_head": False,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
}
"""Where the draft differs from what a config without a model section would give."""


@pytest.fixture(scope="module")
def draft(tiny_run, tmp_path_factory):
    """The folder of a random draft in the layout of other programs."""
    target_config = load_target_config(tiny_run["target"]["path"])
    shape = draft_shape(tiny_config(tiny_run, model=OWN).model, target_config)
    folder = tmp_path_factory.mktemp("draft")
    config = hugging_face_config(
        DraftDescription(shape=shape), target_config=target_config, dtype=torch.float32
    )
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.1 * torch.randn(size, generator=generator)
        for name, size in hugging_face_shapes(shape, shared_weights=False).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(tiny_run, draft, tmp_path_factory):
    """The import of it."""
    folder = tmp_path_factory.mktemp("import") / "run"
    import_folder(draft, tiny_run["target"]["path"], folder, fingerprint=weights_fingerprint)
    return folder


@pytest.fixture
def wanted(tiny_run, run, tmp_path):
    """The overrides of an evaluation, which has no config file."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return {
        "target.path": tiny_run["target"]["path"],
        "evaluate.checkpoint": run,
        "evaluate.prompt_files": f"[{file}]",
        "evaluate.temperature": 0,
        "evaluate.max_new_tokens": 12,
        "evaluate.output": tmp_path / "evaluation.json",
    }


def configured(wanted, **changes):
    keys = {**wanted, **{key.replace("__", "."): value for key, value in changes.items()}}
    return load_config(None, [f"{key}={value}" for key, value in keys.items()], trains=False)


def evaluate(runtime, config, fault=None, names=()):
    """The command's own steps on the ranks of the pool. names: drafts to compare. fault: a lossy
    target, found at start or, where that is not looked at, in its answers."""
    from dspark_megatron.evaluation import command
    from dspark_megatron.run.ranks.runtime import Launch
    from dspark_megatron.targets.huggingface.target import HuggingFaceTarget

    start, check, forget = command.start, command.check_pieces_agree, HuggingFaceTarget.forget
    command.start = lambda *_, **__: runtime
    if fault is not None:
        HuggingFaceTarget.forget = forget_nothing
    if fault == "in the answers":
        command.check_pieces_agree = lambda *_: None
    try:
        command.evaluate(Launch.alone(), config, names)
    except ConfigError as error:
        return str(error)
    finally:
        command.start, command.check_pieces_agree = start, check
        HuggingFaceTarget.forget = forget
    return None


def forget_nothing(self, cache, tokens):
    """Keys and values of rejected drafts stay, the count of tokens goes back."""
    cache.lengths = [length - n for length, n in zip(cache.lengths, tokens, strict=True)]


def test_target_prompts_and_a_checkpoint_are_all_it_needs(pool, wanted, tmp_path):
    assert pool.run(evaluate, world=1, tp=1, config=configured(wanted)) == [None]
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["block_size"] == 4 and found["iteration"] == 0
    (figures,) = found["files"].values()
    assert figures["prompts"] == figures["identical_to_plain"] == 2
    assert figures["ties_with_plain"] == 0 and figures["tau"] >= 1
    (short,) = figures["by_context"]
    assert (short["to"], short["tau"]) == (found["context_edges"][0], figures["tau"])


@pytest.mark.parametrize(
    "fault, message",
    [("at start", "would not be lossless"), ("in the answers", "was not lossless")],
)
def test_a_lossy_decoder_ends_without_figures(pool, wanted, tmp_path, fault, message):
    (tmp_path / "evaluation.json").write_text("earlier")
    (said,) = pool.run(evaluate, world=1, tp=1, config=configured(wanted), fault=fault)
    assert said is not None and message in said and "\n" not in said
    assert (tmp_path / "evaluation.json").read_text() == "earlier"


def test_the_draft_is_the_checkpoints(wanted, tiny_run):
    config = configured(wanted)
    model = with_draft_of(config, evaluated_draft(config)).model
    assert {name: getattr(model, name) for name in OWN} == OWN
    assert model.target_layer_ids == tiny_run["model"]["target_layer_ids"]
    assert model.mask_token_id == tiny_run["model"]["mask_token_id"]


def test_figures_of_a_set_go_by_its_name(pool, wanted, tmp_path):
    config = configured(wanted, evaluate__prompt_files="[chat,maths]", evaluate__max_prompts=1)
    assert pool.run(evaluate, world=1, tp=1, config=config) == [None]
    files = json.loads((tmp_path / "evaluation.json").read_text())["files"]
    assert {name: files[name]["prompts"] for name in files} == {"chat": 1, "maths": 1, "all": 2}


def test_results_lie_beside_the_checkpoint(pool, wanted, run):
    evaluation = pool.run(evaluate, world=1, tp=1, config=configured(wanted, evaluate__output="''"))
    assert evaluation == [None]
    (run / "evaluation.json").unlink()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__block_size": 5}, r"shape.block_size: 4 there, 5 here"),
        ({"evaluate__checkpoint": "''"}, "evaluate.checkpoint is missing"),
        ({"evaluate__prompt_files": "[]"}, "evaluate.prompt_files is empty"),
        (
            {"evaluate__checkpoint": "''", "evaluate__untrained": "true", "evaluate__output": "''"},
            "evaluate.output is missing",
        ),
    ],
)
def test_what_is_still_asked_for(pool, wanted, changes, message):
    (said,) = pool.run(evaluate, world=1, tp=1, config=configured(wanted, **changes))
    assert message in said


def figures_of(pool, config, *names):
    """What the main rank returns, with or without drafts by name."""
    found = pool.run(evaluate, world=1, tp=1, config=config, names=names)
    assert found == [None]
    return json.loads(Path(config.evaluate.output).read_text())


def without_times(figures):
    times = ("tokens_per_second", "drafts_per_second", "plain_tokens_per_second", "speedup")
    return {key: value for key, value in figures.items() if key not in times}


def test_the_folder_of_a_draft_is_evaluated_as_its_import_is(pool, wanted, draft, run):
    of_import = figures_of(pool, configured(wanted))
    of_folder = figures_of(pool, configured(wanted, evaluate__checkpoint=draft))
    assert of_folder["iteration"] is None and of_folder["checkpoint"] == str(draft)
    (ours,), (theirs,) = of_folder["files"].values(), of_import["files"].values()
    assert without_times(ours) == without_times(theirs)


def test_several_drafts_decode_the_same_prompts(pool, wanted, tiny_run, draft, run, unbroken):
    """Of other blocks and taps than the first."""
    config = configured(wanted, evaluate__checkpoint="''", evaluate__temperature=1)
    together = figures_of(pool, config, str(draft), str(run), str(unbroken))["drafts"]
    assert [found["draft"] for found in together] == [str(draft), str(run), str(unbroken)]
    alone = [
        figures_of(pool, configured(wanted, evaluate__checkpoint=name, evaluate__temperature=1))
        for name in (draft, run, unbroken)
    ]
    differences = []
    for one, other in zip(together, alone, strict=True):
        (ours,), (theirs,) = one["files"].values(), other["files"].values()
        differences.append(ours.pop("tau_difference", None))
        assert without_times(ours) == without_times(theirs)
        assert ours["plain_tokens_per_second"] > 0
    first, same, other = differences
    assert first is None and same == {"value": 0.0, "interval": [0.0, 0.0]}
    taus = [next(iter(found["files"].values()))["tau"] for found in together]
    assert other["value"] == pytest.approx(taus[2] - taus[0])
    assert other["interval"][0] <= other["value"] <= other["interval"][1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"evaluate__weights": "ema"}, "holds its weights once"),
        ({"evaluate__best": "true"}, "holds its weights once"),
        ({"model__block_size": 5}, "is of another draft: block_size"),
    ],
)
def test_what_a_folder_cannot_be(pool, wanted, draft, changes, message):
    config = configured(wanted, evaluate__checkpoint=draft, **changes)
    (said,) = pool.run(evaluate, world=1, tp=1, config=config)
    assert message in said


def test_the_folder_of_another_kind_of_draft(wanted, draft, tmp_path):
    other = tmp_path / "dflash"
    other.mkdir()
    dflash = {**json.loads((Path(draft) / "config.json").read_text()), "dflash_config": {}}
    (other / "config.json").write_text(json.dumps(dflash | {"architectures": ["DFlashDraftModel"]}))
    tensors = {"fc.weight": torch.zeros(1)}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="this is a DFlash draft"):
        with_draft_of(configured(wanted), other)


@pytest.mark.commands
def test_the_evaluate_command(tiny_run, unbroken, tmp_path):
    """Two replicas of two ranks share out three prompts; the checkpoint was trained on one."""
    files = []
    for name, prompts in {"a": ["hello", "the hill"], "b": ["inn well"]}.items():
        file = tmp_path / f"{name}.jsonl"
        files.append(write_jsonl(file, [{"prompt": prompt} for prompt in prompts]))
    settings = {
        "prompt_files": [str(f) for f in files],
        "max_new_tokens": 10,
        "output": str(tmp_path / "out.json"),
        "records": str(tmp_path / "drafts.safetensors"),
        "batch_size": 2,
    }
    config_file = write_config(
        tmp_path,
        tiny_run,
        train={"output_dir": str(unbroken)},
        evaluate=settings,
        parallel={"tensor_parallel": 2},
    )
    code, text = finish(launch(config_file, 4, module="evaluate"))
    assert code == 0, text
    assert "speed-up" in text
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["iteration"] == 20
    assert result["files"]["all"]["prompts"] == 3
    assert result["files"][str(files[0])]["identical_to_plain"] == 2
    assert 1 <= result["files"]["all"]["tau"] <= 4
    records = DraftRecords.load(tmp_path / "drafts.safetensors")
    assert records.facts["iteration"] == 20 and records.prompt.unique().tolist() == [0, 1, 2]
    assert len(records) == result["files"]["all"]["rounds"]
    kept = records.accepted.sum().item() / len(records)
    assert kept <= result["files"]["all"]["tau"] <= kept + 1
    greedy = records.accept_rate[records.judged()]
    assert set(greedy.tolist()) <= {0, 1}, "at temperature 0 a token is kept for sure or never"
    assert records.confidence_logits.isfinite().all()
