"""tools/plan.py: layouts, the one that is chosen, and a YAML that runs."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from dspark_megatron.cli.exit_codes import BAD_INPUT, DONE
from dspark_megatron.cli.main import main
from dspark_megatron.config import TargetConfig
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning import layouts
from dspark_megatron.planning.cost.machine import Machine
from dspark_megatron.planning.cost.rates import Rates
from dspark_megatron.planning.cost.run_cost import Bill
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.planning.observing.work import Sent, Work
from dspark_megatron.planning.recommend import Wish, evenly_spread_layers, recommend
from dspark_megatron.planning.target.observed import ObservedTarget
from dspark_megatron.planning.target.plan import target_pass
from dspark_megatron.planning.target.rank_model import target_bytes
from dspark_megatron.planning.target.target_pass import CACHE, GATHERED, OUTPUTS, SHARDS
from dspark_megatron.planning.work import StepWork
from dspark_megatron.run.check import check
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.huggingface.split import TargetSplit
from support.paths import PUBLIC_CONFIGS, ROOT

pytestmark = pytest.mark.slow

NODE = Machine(gpus_per_node=8, nodes=1, gpu_memory_gib=74.5)
MASK = "model.mask_token_id=128255"


def wish(name, *overrides, **options):
    return Wish(str(PUBLIC_CONFIGS / name), overrides=list(overrides), **options)


def loaded(text, tmp_path, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_config(file, overrides)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The file that the command writes for a 70B target, given as its config.json."""
    target = PUBLIC_CONFIGS / "llama-3.1-70b" / "config.json"
    file = tmp_path_factory.mktemp("plan") / "run.yaml"
    options = ["--samples", "512000", "--price-per-gpu-hour", "2", "--output", str(file), "--quiet"]
    assert main(["plan", "--target", str(target), *options, MASK]) == DONE
    return file


@pytest.mark.slow
def test_the_yaml_passes_its_own_dry_run(planned):
    """And says what the run costs."""
    config, text = load_config(planned), planned.read_text()
    dry = describe_run(config, 8)
    at_the_highest = [line for line in dry.splitlines() if "at the highest" in line]
    assert f"# {at_the_highest[0]}" in text
    assert float(at_the_highest[0].split()[-1]) < NODE.usable_bytes / 2**30
    step = float(re.search(r"seconds of a step.*?\n#   sum +([\d.]+)", text, re.S)[1])
    hours = re.search(
        r"hours of the run: ([\d,.]+) for 10,000 steps, ([\d,]+) .*?, ([\d,]+) at 2", text
    )
    hours, gpu_hours, price = (float(value.replace(",", "")) for value in hours.groups())
    assert hours == pytest.approx(step * 10_000 / 3600, abs=0.06)
    assert gpu_hours == pytest.approx(8 * hours, abs=1) and price == pytest.approx(
        2 * gpu_hours, abs=2
    )
    assert re.search(r"from \d+ epochs on a store costs less GPU time", text)


def chosen_and_rows(text):
    """The columns of each layout, and whether it fits."""
    rows = [line for line in text.splitlines() if line.endswith(("fits", "too large", "chosen"))]
    return [(row.split()[1:6], row.rpartition(" ")[2]) for row in rows]


@pytest.mark.slow
def test_the_fastest_that_fits_is_chosen(planned):
    rows = chosen_and_rows(planned.read_text())
    fitting = [(float(c[1]), float(c[0]), end) for c, end in rows if end != "large"]
    assert len(rows) == 7 and min(fitting)[2] == "chosen"
    for _, gib, _ in fitting:
        assert gib < NODE.usable_bytes / 2**30


def made_up_work(plan):
    """TP 8 sends least, and TP 4 is done first."""
    tp = plan.config.parallel.tensor_parallel
    sent = Sent("all-reduce", "draft, tensor-parallel", tp, tp, {8: 1, 4: 2}.get(tp, 9) * 10**9, 1)
    draft = Work({8: 10**17, 4: 10**16}.get(tp, 10**18), 0, (sent,))
    return StepWork({"target": Work(10**15), "draft": draft})


def test_least_time_is_not_least_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "step_work", made_up_work)
    text = recommend(wish("llama-3.1-70b", MASK), NODE)
    fitting = {cells[3]: end for cells, end in chosen_and_rows(text) if end != "large"}
    assert len(fitting) > 1 and fitting[min(fitting, key=float)] == "fits"
    assert loaded(text, tmp_path).parallel.tensor_parallel == 4


def test_a_given_key_stays(tmp_path):
    fixed = ("parallel.tensor_parallel=8", "train.recompute_activations=true")
    config = loaded(recommend(wish("llama-3.1-70b", MASK, *fixed), NODE), tmp_path)
    assert config.parallel.tensor_parallel == 8 and config.train.recompute_activations


def test_a_missing_mask_token_is_the_dry_run_s_to_refuse(tmp_path):
    text = recommend(wish("qwen3-8b", "parallel.tensor_parallel=8"), NODE)
    assert "mask_token_id: null  # to be set" in text
    with pytest.raises(ConfigError, match="mask_token_id is missing"):
        describe_run(loaded(text, tmp_path), 8)
    describe_run(loaded(text, tmp_path, "model.mask_token_id=151669"), 8)


def test_passes_of_the_target_are_those_that_it_makes(tmp_path):
    """Four samples of 4096 tokens: a pass of 4000 tokens takes a part of one, 9000 two of them."""
    keys = ("parallel.tensor_parallel=8", "parallel.sequence_parallel=true", MASK)
    keys += ("train.recompute_activations=true",)
    text = recommend(wish("llama-3.1-70b", *keys, micro_batch_size=4), NODE)
    plan_of = partial(loaded, text, tmp_path)
    found = {}
    for most in ("null", 9000, 4000):
        config = plan_of("target.samples_per_pass=4", f"target.max_tokens_per_forward={most}")
        found[most] = target_pass(check(config, 8, use="plan")).moments
    passes = {most: [name for name in found[most] if name.startswith("pass")] for most in found}
    assert [len(passes[most]) for most in passes] == [1, 2, 8]
    caches = {most: [parts.get(CACHE, 0) for parts in found[most].values()] for most in found}
    assert max(caches["null"]) == max(caches[9000]) == 0
    # 80 layers, keys and values of 1 of 8 key/value heads of 128 numbers, bf16.
    assert max(caches[4000]) == pytest.approx(80 * 4096 * 2 * 128 * 2, rel=0.02)


def test_a_length_that_the_target_was_not_made_for_is_noted(tmp_path):
    config = load_config(
        ROOT / "examples" / "qwen3-4b.yaml", [f"target.path={PUBLIC_CONFIGS}/qwen3-4b"]
    )
    assert "the target's max_position_embeddings" not in describe_run(config, 8)
    config.data.max_length = 50000
    assert "(50000) is more than the target's max_position_embeddings (40960)" in describe_run(
        config, 8
    )


def test_megatron_targets_are_not_compared():
    with pytest.raises(ConfigError, match="target.provider=huggingface only"):
        recommend(wish("qwen3-8b", MASK, "target.provider=megatron"), NODE)


def test_nothing_fits():
    with pytest.raises(ConfigError, match=r"leanest \(TP .*\) takes .* GiB a GPU.*more nodes"):
        recommend(wish("llama-3.1-405b", MASK, "parallel.tensor_parallel=8"), NODE)


def test_the_rules_allow_nothing():
    with pytest.raises(ConfigError, match="global_batch_size"):
        recommend(wish("qwen3-8b", "parallel.tensor_parallel=1", global_batch_size=4), NODE)
    with pytest.raises(ConfigError, match=r"shard_across_data_parallel \(3\).*: \[1, 2, 4, 8\]"):
        recommend(wish("qwen3-8b", "target.shard_across_data_parallel=3"), NODE)
    with pytest.raises(ConfigError, match="folder with a config.json"):
        recommend(Wish("no/such/model.bin"), NODE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nodes": 0}, r"nodes \(0\) must be >= 1"),
        ({"gpus_per_node": -1}, r"gpus_per_node \(-1\) must be >= 1"),
        ({"gpu_memory_gib": 0}, r"gpu_memory_gib \(0\) must be > 0"),
        ({"margin": 2}, r"margin \(2\).*\(0, 1\]"),
        ({"gpu_memory_gib": float("nan")}, r"gpu_memory_gib \(nan\) must be > 0"),
        ({"nodes": 10**9}, r"nodes \(1000000000\) x gpus_per_node \(8\) must be at most 100,000"),
        ({"rates": Rates(network=0)}, r"network \(0\) must be > 0"),
    ],
)
def test_a_machine_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        recommend(wish("qwen3-8b"), replace(NODE, **changes))


def test_a_wish_that_cannot_be():
    with pytest.raises(ConfigError, match=r"samples \(0\) must be >= 1"):
        recommend(wish("qwen3-8b", bill=Bill(samples=0)), NODE)
    with pytest.raises(ConfigError, match=r"target\.path is the target that is planned for"):
        recommend(wish("qwen3-8b", "target.path=elsewhere"), NODE)


def test_an_output_without_a_folder_is_refused_first(capsys):
    plan = ["plan", "--target", str(PUBLIC_CONFIGS / "qwen3-8b"), "--output"]
    assert main([*plan, "no/such/run.yaml"]) == main([*plan, str(PUBLIC_CONFIGS)]) == BAD_INPUT
    said = capsys.readouterr()
    assert "folder of --output no/such/run.yaml must exist" in said.err
    assert "must be a file, and it is a folder" in said.err and not said.out


def test_a_size_that_the_rules_refuse_is_named_with_the_reason(tmp_path):
    keys = ("parallel.sequence_parallel=false", "train.recompute_activations=true")
    keys += ("target.shard_across_data_parallel=1", "train.iterations=7")
    text = recommend(wish("qwen3-8b", *keys, global_batch_size=2), NODE)
    reasons = [line for line in text.splitlines() if line.startswith("# refused: TP ")]
    assert [line.split()[3] for line in reasons] == ["1:", "2:"]
    assert all("train.global_batch_size (2) must be divisible" in line for line in reasons)
    assert "iterations: 7" in text and "epochs:" not in text


@pytest.mark.parametrize(
    "layers, ids",
    [(36, [1, 9, 17, 25, 33]), (40, [1, 10, 19, 28, 37]), (126, [1, 32, 62, 93, 123])],
)
def test_taps_are_spread_as_in_the_paper(layers, ids):
    assert evenly_spread_layers(layers) == ids


def test_taps_are_spread_as_in_the_backbone_recipe():
    """SpecForge's Inkling-Small has 8 of 42."""
    assert evenly_spread_layers(42, 8) == [1, 6, 12, 17, 23, 28, 34, 39]
    with pytest.raises(ConfigError, match="must be at least 2"):
        evenly_spread_layers(42, 1)


def test_stored_states_of_the_paper_s_size():
    """DeepSpec's own figure for Qwen3-4B is 38 TB."""
    keys = MASK, "model.target_layer_ids=[1]", "parallel.tensor_parallel=2"
    text = recommend(wish("qwen3-8b", *keys, bill=Bill(samples=1000)), NODE)
    gib = 1000 * (4096 * (2 * 4096 * 2 + 6) + 56) / 2**30
    assert f"written once: {gib:,.3f} GiB in " in text


def test_a_run_on_stored_states_is_planned_without_a_target(tmp_path):
    """And reading them counts where the disk is slow."""
    keys = MASK, "target.provider=cache", "target.cache=states", "parallel.tensor_parallel=1"
    text = recommend(wish("qwen3-8b", *keys), NODE)
    assert "target, computing" not in text and "a store of the states instead" not in text
    slow = recommend(wish("qwen3-8b", *keys), replace(NODE, rates=Rates(disk=0.01)))
    seconds = 512 * (4096 * (6 * 4096 * 2 + 6) + 56) / 1e7
    assert re.search(rf"the reading +{seconds:.3f}", slow)


@pytest.mark.parametrize(
    "name, split", [("llama-3.1-70b", (2, 4, 4, 1)), ("llama-3.1-405b", (8, 4, 2, 1))]
)
def test_a_sharded_target_s_weights_travel(name, split):
    """What a rank gets in a forward pass is what it does not hold of its split of the layers."""
    config = load_target_config(PUBLIC_CONFIGS / name)
    split, layers = TargetSplit(*split), config.num_hidden_layers
    settings = TargetConfig(path=str(PUBLIC_CONFIGS / name))
    target = ObservedTarget(settings, config, torch.bfloat16, split, (1, layers - 2), True)
    found = target.forward_pass((1, 4096))
    whole = TargetSplit(split.tp_size, split.dp_size)
    held = target_bytes(config, torch.bfloat16, split)
    missing = target_bytes(config, torch.bfloat16, whole) - held
    sent = {one.group: one for one in found.work.sent}
    assert sent[SHARDS].sent == pytest.approx(missing, rel=0.01)
    assert sent[OUTPUTS].handed == (2 * layers + 1) * 4096 * config.hidden_size * 2
    layer = (missing + held) / layers
    assert 2.9 * layer < max(p.get(GATHERED, 0) for p in found.moments.values()) < 3.2 * layer
