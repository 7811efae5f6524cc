"""Acceptance estimated without generation: accept rates on a split vocabulary, the rounds of a
decoder, and figures equal to those of real decoding."""

import json
import shutil

import convert_checkpoint
import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.acceptance import probabilities, round_starts
from dspark_megatron.ops.logit_transform import LogitTransform, TargetHead
from dspark_megatron.storage.checkpoints.tracker import BEST
from dspark_megatron.storage.checkpoints.whole import iteration_folder
from dspark_megatron.storage.training_checkpoint import find_checkpoint
from support.decoded import PROMPTS
from support.draft_steps import whole
from support.head_loss_inputs import make_inputs, shard_of
from support.reference import (
    PlainDraft,
    plain_blocks,
    plain_candidates,
    plain_tau,
    plain_transform,
)
from support.shapes import SHAPE
from support.tiny_draft import build_tiny_draft, layout_of, make_samples, target_head
from support.tiny_target import make_chats, tiny_config
from support.training_runs import curve, run_training, run_until_stopped, untimed


def plain_accept_rates(inputs, temperature, transforms):
    """[n] from whole softmaxes, or one-hot ones of the argmax at temperature 0."""
    draft = plain_transform(inputs["hidden"] @ inputs["lm_head"].t(), *transforms[0])
    if inputs["latent"] is not None:
        draft = draft + inputs["latent"] @ inputs["markov_w2"].t()
    target = plain_transform(inputs["target_hidden"] @ inputs["lm_head"].t(), *transforms[1])
    p, q = probabilities(draft, temperature), probabilities(target, temperature)
    return 1 - (p - q).abs().sum(dim=-1) / 2


PLAIN = (1.0, None), (1.0, None)
"""Scale and soft cap of the draft's base logits, and of the target's."""


def split_accept_rates(runtime, inputs, temperature, transforms=PLAIN, chunk_rows=4):
    from dspark_megatron.ops.acceptance import accept_rates
    from dspark_megatron.ops.head_loss import HeadWeights

    shard, lm_head, markov_w2 = shard_of(inputs, runtime.tp_group)
    weight = lm_head if markov_w2 is None else torch.cat([lm_head, markov_w2], dim=1)
    of_draft, of_target = (LogitTransform(*one) for one in transforms)
    head = HeadWeights(weight, markov_w2, shard, of_draft)
    return accept_rates(
        head.factors(head.features(inputs["hidden"], inputs["latent"])),
        TargetHead(lm_head, of_target).factors(inputs["target_hidden"]),
        shard,
        temperature=temperature,
        chunk_rows=chunk_rows,
        tp_group=runtime.tp_group,
    )


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_accept_rates_equal_plain_ones(pool, tp):
    """61 tokens, so the last shard ends in padding; also logits of thousands, and no row; and
    logits that are scaled and capped before the temperature."""
    cases = [dict(), dict(kind="extreme"), dict(with_latent=False), dict(rows=0)]
    both = ((0.5, 1.5), (2.0, 4.0)), ((0.25, None), (1.0, 2.0))
    for case, transforms in [(case, PLAIN) for case in cases] + [({}, one) for one in both]:
        inputs = make_inputs(61, torch.float32, **case)
        for temperature in (0.0, 0.7, 1.0):
            arguments = dict(inputs=inputs, temperature=temperature, transforms=transforms)
            expected = plain_accept_rates(**arguments)
            for got in pool.run(split_accept_rates, world=tp, tp=tp, **arguments):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tp", [1, 4])
def test_of_equally_likely_tokens_the_lowest_id_counts(pool, tp):
    """Draft and target each hold two tokens equal, of different shards."""
    inputs = make_inputs(61, torch.float32, with_latent=False, rows=2)
    inputs["lm_head"] = torch.zeros(61, 16)
    inputs["lm_head"][[5, 20, 50], [0, 1, 2]] = 1.0
    inputs["hidden"], inputs["target_hidden"] = torch.zeros(2, 2, 16)
    inputs["hidden"][:, [0, 1]] = 1.0  # 5 and 20
    inputs["target_hidden"][0, [0, 2]] = 1.0  # 5 and 50: the draft's 5
    inputs["target_hidden"][1, [1, 2]] = 1.0  # 20 and 50: not the draft's 5
    for got in pool.run(split_accept_rates, world=tp, tp=tp, inputs=inputs, temperature=0.0):
        assert got.tolist() == [1, 0]


def plain_rounds(rates, masks, anchors):
    """Every course that the rounds over a text can take, followed one by one: anchor, chance,
    tokens kept and tokens judged of each."""
    found, k = [], len(rates[0])

    def start(anchor, chance):
        if anchor not in anchors or chance == 0:
            return
        row = rates[anchors.index(anchor)], masks[anchors.index(anchor)]
        for kept, (rate, supervised) in enumerate(zip(*row, strict=True)):
            if not supervised:  # all are kept, and the last of them ended the answer
                found.append((anchor, chance, kept, kept))
                return
            found.append((anchor, chance * (1 - rate), kept, k))
            start(anchor + kept + 1, chance * (1 - rate))
            chance *= rate
        found.append((anchor, chance, k, k))
        start(anchor + k + 1, chance)

    for anchor in anchors:
        if anchor - 1 not in anchors:
            start(anchor, 1.0)
    return found


def test_round_starts_follow_every_course_of_a_round():
    """Two answers of a chat, at positions 2 to 9 and 11 to 13."""
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    anchors = torch.tensor(plain_candidates(mask))
    blocks = plain_blocks(torch.zeros(len(mask), dtype=torch.long), mask, anchors, 3)
    rates = torch.rand(len(anchors), 3, generator=torch.Generator().manual_seed(0)).double()
    got = round_starts(rates, blocks.eval_mask, anchors)
    rounds = plain_rounds(rates.tolist(), blocks.eval_mask.tolist(), anchors.tolist())
    expected = [sum(chance for a, chance, *_ in rounds if a == anchor) for anchor in anchors]
    assert got.tolist() == pytest.approx(expected)
    assert got[0] == got[7] == 1 and 0 < got[1] < 1


def estimate(runtime, temperature, micro_batch_size, max_blocks, lockstep=False):
    """Figures of a tiny draft on tiny samples, its weights, and how often states were asked for."""
    from dspark_megatron.data.conversation import Sample
    from dspark_megatron.evaluation.estimate import EstimateSettings, estimate_acceptance
    from support.sharded_targets import CountedStates

    draft, samples = build_tiny_draft(runtime, SHAPE), make_samples(SHAPE, LENGTHS)
    head = few_likely(draft.lm_head, draft.vocab_shard.vocab_start_index)
    draft.load_frozen_replicas(draft.embed_tokens.weight, head)
    target = CountedStates(samples)
    target.lockstep = lockstep
    figures = estimate_acceptance(
        draft,
        target,
        TargetHead(draft.lm_head),
        [Sample(*pair) for pair in zip(samples.input_ids, samples.loss_masks, strict=True)],
        EstimateSettings(temperature, micro_batch_size, max_blocks, chunk_rows=4),
        dp_group=runtime.dp_group,
    )
    weights = {n: p.detach() for n, p in draft.named_parameters() if p.requires_grad}
    ranks = {"tp_rank": runtime.tp_group.rank(), "dp_rank": runtime.dp_group.rank()}
    return {
        "figures": figures,
        "weights": weights,
        "layout": layout_of(draft),
        "calls": target.calls,
        **ranks,
    }


LENGTHS = (20, 13, 17, 9, 2)
"""Of samples whose masks have gaps; the last has no anchor."""


def few_likely(lm_head, first_id=0):
    """Four likely tokens, so that draft and target agree now and then. lm_head [v, h]."""
    ids = torch.arange(first_id, first_id + len(lm_head))
    return lm_head * torch.where(ids < 4, 1, 0.05)[:, None]


def plain_estimate(weights, temperature):
    """Every course of every round, counted as `figures.acceptance` counts rounds."""
    twin = PlainDraft(SHAPE)
    embed, head = target_head(SHAPE)
    head = few_likely(head)
    twin.load_state_dict({**weights, "embed_tokens.weight": embed, "lm_head.weight": head})
    samples, rounds, blocks, block_tau = make_samples(SHAPE, LENGTHS), [], 0, 0.0
    for ids, mask, taps, last in zip(
        samples.input_ids, samples.loss_masks, samples.taps, samples.last_hidden, strict=True
    ):
        anchors = torch.tensor(plain_candidates(mask))
        if not len(anchors):
            continue
        supervised = plain_blocks(ids, mask, anchors, SHAPE.block_size).eval_mask
        at = (anchors[:, None] + torch.arange(SHAPE.block_size)).clamp(max=len(ids) - 1)
        with torch.no_grad():
            draft, target = twin(taps, ids, anchors).logits, twin.lm_head(last[at])
        p, q = probabilities(draft, temperature), probabilities(target, temperature)
        rates = torch.minimum(p, q).sum(dim=-1)
        rounds += plain_rounds(rates.tolist(), supervised.tolist(), anchors.tolist())
        blocks += len(anchors)
        block_tau += plain_tau(rates, supervised).sum().item()
    total = sum(chance for _, chance, _, _ in rounds)
    figures = {"samples": len(LENGTHS), "rounds": total, "tau": blocks / total}
    figures |= {"block_tau": block_tau / blocks, "accept_rate": [], "prefix_survival": []}
    for k in range(SHAPE.block_size):
        kept = sum(chance for _, chance, accepted, _ in rounds if accepted > k)
        reached = sum(c for _, c, accepted, judged in rounds if judged > k and accepted >= k)
        offered = sum(chance for _, chance, _, judged in rounds if judged > k)
        figures["accept_rate"].append(kept / reached)
        figures["prefix_survival"].append(kept / offered)
    return figures


# World size, tensor-parallel size, micro-batch size, blocks of one pass of the draft.
LAYOUTS = [(1, 1, 4, 3), (2, 2, 1, 100), (4, 4, 2, 3), (2, 1, 2, 7), (4, 2, 1, 4)]


@pytest.mark.parametrize("world, tp, micro_batch_size, max_blocks", LAYOUTS)
def test_the_estimate_equals_the_plain_one(pool, world, tp, micro_batch_size, max_blocks):
    for temperature in (0.0, 0.5):
        arguments = dict(micro_batch_size=micro_batch_size, max_blocks=max_blocks)
        ranks = pool.run(estimate, world=world, tp=tp, temperature=temperature, **arguments)
        expected = plain_estimate(whole(ranks, "weights", SHAPE), temperature)
        for rank in ranks:
            assert rank["figures"].keys() == expected.keys()
            for name, value in expected.items():
                assert rank["figures"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("lockstep, calls", [(False, [2, 1, 1, 1]), (True, [2, 2, 2, 2])])
def test_ranks_without_a_sample_keep_in_step(pool, lockstep, calls):
    """Five samples for four ranks: one has a second turn."""
    arguments = dict(temperature=1.0, micro_batch_size=1, max_blocks=100, lockstep=lockstep)
    ranks = pool.run(estimate, world=4, tp=1, **arguments)
    assert [rank["calls"] for rank in ranks] == calls


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Six chats after the 24 that are trained on."""
    path = make_chats(tmp_path_factory.mktemp("heldout") / "chats.jsonl", 30)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[24:]))
    return path


def with_estimates(tiny_run, heldout, output, **sections):
    """As the unbroken run, with an estimate every 4 steps, and only one newest checkpoint."""
    settings = {"output_dir": str(output), "micro_batch_size": 4, "keep_last": 1}
    sections["train"] = {**settings, **sections.get("train", {})}
    evaluate = {"heldout_files": [str(heldout)], "every": 4, "temperature": 0.0}
    return tiny_config(tiny_run, evaluate=evaluate, **sections)


@pytest.fixture(scope="module")
def estimated(pool, tiny_run, heldout, tmp_path_factory):
    output = tmp_path_factory.mktemp("estimated")
    pool.run(run_training, world=1, tp=1, config=with_estimates(tiny_run, heldout, output))
    return output


def estimates(output):
    return [json.loads(line) for line in (output / "heldout.jsonl").read_text().splitlines()]


def best_of(output):
    """The tracked iteration, the first of the highest tau, and those there is a checkpoint of."""
    checkpoints = output / "checkpoints"
    tracked = int((checkpoints / "best_checkpointed_iteration.txt").read_text())
    highest = max(estimates(output), key=lambda row: row["tau"])["iteration"]
    return tracked, highest, {int(p.name[5:]) for p in checkpoints.glob("iter_*")}


def test_estimates_leave_the_curve_as_it_is(unbroken, estimated):
    assert untimed(curve(unbroken)) == untimed(curve(estimated))
    assert [row["iteration"] for row in estimates(estimated)] == [4, 8, 12, 16, 20]


def test_the_best_checkpoint_is_kept(estimated):
    tracked, highest, there = best_of(estimated)
    assert tracked == highest < 20, "the last checkpoint is kept anyway"
    assert there == {tracked, 20}
    assert find_checkpoint(estimated, BEST) == iteration_folder(estimated / "checkpoints", tracked)
    assert find_checkpoint(estimated).name == "iter_0000020"


def test_the_best_checkpoint_is_exported(tiny_run, estimated, tmp_path):
    command = ["export", "--checkpoint", str(estimated), "--target", tiny_run["target"]["path"]]
    command += ["--output", str(tmp_path / "out"), "--iteration", "best", "--skip-logits"]
    assert convert_checkpoint.main(command) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{best_of(estimated)[0]} iterations" in card


def test_a_run_without_estimates_has_no_best_checkpoint(unbroken):
    with pytest.raises(ConfigError, match="best_checkpointed_iteration.txt is not there"):
        find_checkpoint(unbroken, BEST)


def test_the_best_checkpoint_survives_a_kill_and_another_layout(
    pool, tiny_run, heldout, estimated, tmp_path
):
    """Killed after an estimate past its last checkpoint, and, before, between a checkpoint and the
    tracker of the best."""
    parallel = {"tensor_parallel": 2}
    train = {"micro_batch_size": 1, "save_every": 1000}
    config = with_estimates(tiny_run, heldout, tmp_path, parallel=parallel, train=train)
    pool.run(run_until_stopped, world=4, tp=2, config=config, steps=10)
    with (tmp_path / "heldout.jsonl").open("a") as file:
        file.write('{"iteration": 12, "tau": 99.0}\n{"iteration": 1')
    (tmp_path / "checkpoints" / "best_checkpointed_iteration.txt").write_text("4\n")
    pool.run(run_training, world=1, tp=1, config=with_estimates(tiny_run, heldout, tmp_path))
    assert best_of(tmp_path) == best_of(estimated)
    for mine, theirs in zip(estimates(tmp_path), estimates(estimated), strict=True):
        assert mine["iteration"] == theirs["iteration"]
        assert mine["tau"] == pytest.approx(theirs["tau"], rel=1e-6)


def test_estimates_of_other_conditions_do_not_compare(pool, tiny_run, heldout, estimated, tmp_path):
    """On fewer answers even a lower tau is the best of its own kind."""
    shutil.copytree(estimated, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoints" / "iter_0000020" / "dspark.json"
    file.with_name("checksums.json").unlink()
    meta = json.loads(file.read_text())
    meta["best"]["tau"] = 99.0
    file.write_text(json.dumps(meta))
    config = with_estimates(tiny_run, heldout, tmp_path, train={"iterations": 21})
    config.evaluate.heldout_samples = 1
    pool.run(run_training, world=1, tp=1, config=config)
    assert best_of(tmp_path)[0] == 21 and estimates(tmp_path)[-1]["samples"] == 1


def greedy(runtime, config):
    """Figures of real greedy decoding with the best checkpoint, and the estimate on its answers."""
    from dspark_megatron.evaluation.decoding import Decoder, Sampling
    from dspark_megatron.evaluation.estimate import (
        EstimateSettings,
        answer_sample,
        estimate_acceptance,
    )
    from dspark_megatron.evaluation.figures import acceptance
    from dspark_megatron.run.build import build_draft, build_target
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints.loading import load_checkpoint
    from dspark_megatron.storage.target_folder import stop_token_ids

    plan = check(config, runtime.world_size)
    draft, target = build_draft(plan, runtime).eval(), build_target(plan, runtime)
    load_checkpoint(find_checkpoint(config.train.output_dir, BEST), draft, optimizer=None)
    decoder = Decoder(
        target,
        draft,
        TargetHead(draft.lm_head),
        Sampling(0.0, 40, frozenset(stop_token_ids(config.target.path, plan.tokenizer))),
        batch_size=len(PROMPTS),
    )
    prompts = [plan.tokenizer(text)["input_ids"] for text in PROMPTS]
    answers = decoder.speculative(prompts, [0] * len(prompts)).generations
    samples = [answer_sample(p, a.token_ids) for p, a in zip(prompts, answers, strict=True)]
    settings = EstimateSettings.of(config, draft)
    real = acceptance(answers, plan.shape.num_draft_tokens)
    figures = estimate_acceptance(
        draft, target, decoder.target_head, samples, settings, dp_group=runtime.dp_group
    )
    return real, figures


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_rounds_are_foreseen_exactly(pool, tiny_run, estimated, tp):
    config = tiny_config(
        tiny_run, train={"output_dir": str(estimated)}, parallel={"tensor_parallel": tp}
    )
    real, figures = pool.run(greedy, world=tp, tp=tp, config=config)[0]
    assert real["tau"] > 1.05, "the draft should be right now and then"
    assert figures["rounds"] == real["rounds"]
    assert figures["accept_rate"] == pytest.approx(real["accept_rate"])


CE_ALONE = {"l1_loss_alpha": 0.0, "confidence_head_alpha": 0.0}
REFUSED = [
    ({"evaluate": {"every": 5}}, "evaluate.every .5. and evaluate.heldout_files"),
    ({"evaluate": {"heldout_files": ["b.jsonl"]}}, "evaluate.every .None. and"),
    ({"evaluate": {"checkpoint": "run", "untrained": True}}, "name two drafts"),
    ({"evaluate": {"heldout_files": ["b.jsonl"], "every": 5}, "loss": CE_ALONE}, "cross entropy"),
    ({"evaluate": {"best": True, "untrained": True}}, "name two drafts"),
]


@pytest.mark.parametrize("sections, message", REFUSED)
def test_settings_that_contradict_each_other(tiny_run, sections, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_run, **sections)
