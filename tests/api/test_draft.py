"""The Python face gives the numbers of the commands: loss, tokens, exports, on one rank and two."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.verify import verify_folder
from support.tiny_target import tiny_config

RECORDS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in (("hello", "the hill in the inn"), ("all", "then all bell thin there well"))
]


@pytest.fixture(scope="module")
def folders(tiny_run, unbroken, tmp_path_factory):
    """The same draft in two layouts of others, in the type that loses nothing."""
    folder = tmp_path_factory.mktemp("layouts")
    return {
        layout: export_checkpoint(
            unbroken,
            tiny_run["target"]["path"],
            folder / layout,
            WriteOptions(layout=layout, dtype=None),
        )
        for layout in ("hf", "speculators")
    }


def load(config, path, dtype="float32", **options):
    from dspark_megatron import Draft, Target

    target = Target.from_pretrained(config.target.path)
    return Draft.from_pretrained(path, target=target, config=config, dtype=dtype, **options)


def loss_of(runtime, config, path, with_states=False):
    """Loss, figures and the norm of each gradient."""
    draft = load(config, path)
    samples = draft.target.encode(RECORDS)
    states = draft.target.states(samples, draft.target_layer_ids) if with_states else None
    value, figures = draft.loss(samples, states)
    value.backward()
    return value.item(), figures, [p.grad.norm().item() for p in draft.parameters()]


def first_step(runtime, config):
    """What training logs for its first step, from the weights that the config names."""
    from dspark_megatron.data.dataset import load_samples
    from dspark_megatron.run.check import check
    from dspark_megatron.run.data import sample_rules
    from dspark_megatron.training.ending.stop_requests import stop_requests
    from dspark_megatron.training.loop import train

    plan = check(config, runtime.world_size, use="train")
    rules = sample_rules(config)
    with stop_requests() as stop:
        train(plan, runtime, stop)
    return len(load_samples(config.data.train_files, plan.tokenizer, 301, rules))


@pytest.fixture(scope="module")
def logged(pool, tiny_run, unbroken, tmp_path_factory):
    """The first line of a run that starts from the draft and learns from the records."""
    folder = tmp_path_factory.mktemp("logged")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    config = tiny_config(
        tiny_run,
        data={"train_files": [str(folder / "data.jsonl")], "max_length": 256},
        train={
            "output_dir": str(folder / "run"),
            "initial_checkpoint": str(unbroken),
            **{"iterations": 1, "micro_batch_size": 2, "global_batch_size": 2},
        },
    )
    assert pool.run(first_step, world=1, tp=1, config=config) == [2]
    return json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("tp, with_states", [(1, False), (1, True), (2, False)])
def test_the_loss_is_that_of_trainings_first_step(
    pool, tiny_run, unbroken, logged, tp, with_states
):
    config = tiny_config(tiny_run)
    options = dict(config=config, path=unbroken, with_states=with_states)
    value, figures, norms = pool.run(loss_of, world=tp, tp=tp, **options)[0]
    assert value == pytest.approx(logged["loss"], rel=1e-5)
    for name in ("ce_loss", "l1_loss", "confidence_loss", "tau", "accept_rate"):
        assert figures[name] == pytest.approx(logged[name], rel=1e-5), name
    if tp == 1:
        norm = sum(n * n for n in norms) ** 0.5
        assert norm == pytest.approx(logged["grad_norm"], rel=1e-4)


def logits_of(runtime, config, path):
    """What the loss and a draft say of a context."""
    draft = load(config, path)
    value, _ = draft.loss(draft.target.encode(RECORDS))
    return value.item(), draft.propose("the inn")


def test_every_layout_is_the_same_draft(pool, tiny_run, unbroken, folders):
    config = tiny_config(tiny_run)
    first, *others = (
        pool.run(logits_of, world=1, tp=1, config=config, path=path)[0]
        for path in (unbroken, *folders.values())
    )
    assert others == [first, first]
    assert len(first[1].token_ids) == len(first[1].confidence) == 3


def answer(runtime, config, path, temperature):
    draft = load(config, path, iteration=20)
    ids = draft.target.prompt_ids("hello")
    found = draft.generate(ids, max_new_tokens=24, temperature=temperature)
    first = draft.propose([*ids, found.token_ids[0]], temperature=temperature)
    return ids, found, first


@pytest.mark.parametrize("tp", [1, 2])
def test_a_greedy_answer_is_the_targets_own(pool, tiny_run, unbroken, tp):
    from transformers import AutoModelForCausalLM

    config = tiny_config(tiny_run)
    ranks = pool.run(answer, world=tp, tp=tp, config=config, path=unbroken, temperature=0.0)
    ids, found, first = ranks[0]
    model = AutoModelForCausalLM.from_pretrained(config.target.path)
    own = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    assert found.token_ids == own[0, len(ids) :].tolist()
    assert all(rank[1].token_ids == found.token_ids for rank in ranks)
    rounds = found.rounds
    gained = sum(r.accepted + r.bonus for r in rounds)
    assert found.figures["tau"] == pytest.approx(gained / len(rounds))
    kept = rounds[0].accepted
    assert first.token_ids[:kept] == found.token_ids[1 : 1 + kept]
    assert rounds[0].confidence_logits == pytest.approx(
        torch.tensor(first.confidence).logit().tolist(), abs=1e-3
    )


def export_twice(runtime, config, path, folder):
    """As it was loaded, and with a weight that was changed."""
    draft = load(config, path)
    draft.export(folder / "loaded", dtype=None)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter *= 2
    draft.export(folder / "changed", dtype=None, layout="speculators")


@pytest.mark.parametrize("tp", [1, 2])
def test_an_export_is_what_is_in_memory(pool, tiny_run, unbroken, folders, tmp_path, tp):
    config, target = tiny_config(tiny_run), tiny_run["target"]["path"]
    options = dict(config=config, path=unbroken, folder=tmp_path)
    pool.run(export_twice, world=tp, tp=tp, **options)
    loaded, changed = tmp_path / "loaded", tmp_path / "changed"
    verify_folder(loaded, checkpoint=unbroken, target_dir=target)
    verify_folder(changed, target_dir=target)
    for file in folders["hf"].iterdir():
        if file.name != "README.md":  # which has the folder's name
            assert (loaded / file.name).read_bytes() == file.read_bytes()
    there, doubled = (
        load_file(path / "model.safetensors") for path in (folders["speculators"], changed)
    )
    assert there.keys() == doubled.keys()
    for name, tensor in there.items():
        assert torch.equal(2 * tensor, doubled[name]), name


def mistakes(runtime, config, path, folders):
    """The message of each."""
    from dspark_megatron import ConfigError, Draft, Target

    draft = load(config, path)
    target, said = draft.target, {}

    def tried(name, call, *arguments, **options):
        with pytest.raises(ConfigError) as error:
            call(*arguments, **options)
        said[name] = str(error.value)

    samples = target.encode(RECORDS)
    short = [sample._replace(loss_mask=torch.zeros_like(sample.loss_mask)) for sample in samples]
    tried("nothing to learn", draft.loss, short)
    tried("other states", draft.loss, samples, target.states(samples[:1], draft.target_layer_ids))
    tried("layers", target.states, samples, [9])
    tried("layout", draft.export, folders["hf"].parent / "x", layout="gguf")
    tried("temperature", draft.generate, "hello", temperature=-1)
    tried("ids", draft.propose, [5, 301])
    tried("one token", draft.propose, [5])
    tried("no folder", Draft.from_pretrained, "nowhere", target=target)
    tried("iteration", Draft.from_pretrained, folders["hf"], target=target, iteration=5)
    tried("device", Target.from_pretrained, config.target.path, device="cuda:3")
    tried("groups", Target.from_pretrained, config.target.path, tensor_parallel=2)
    return said


def test_mistakes_are_told_in_a_sentence(pool, tiny_run, unbroken, folders):
    config = tiny_config(tiny_run)
    said = pool.run(mistakes, world=1, tp=1, config=config, path=unbroken, folders=folders)[0]
    for name, part in {
        "nothing to learn": "two adjacent tokens",
        "other states": "taps of shape [2,",
        "layers": "must be in [0, 3]",
        "layout": "'speculators'",
        "temperature": "must be >= 0",
        "ids": "[0, 301)",
        "one token": "at least 2 tokens",
        "no folder": "give a draft's folder or a run",
        "iteration": "has no iterations",
        "device": "CUDA_VISIBLE_DEVICES",
        "groups": "leave it out",
    }.items():
        assert part in said[name], said[name]
